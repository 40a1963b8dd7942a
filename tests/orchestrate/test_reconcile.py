"""Reconcile on real files: two at once, killed at any point, refused by the scheduler, with a damaged state file."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.base import ExecutorError, JobRequest, Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.engines.weights import Role, weights_of
from hpc_rl.orchestrate.decide import Policy
from hpc_rl.orchestrate.giving_up import give_up
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import RECONCILE_LEASE, Report, Run, RunBusy, look, reconcile
from hpc_rl.orchestrate.spent import remove_spent
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.lease import acquire
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.manifest import Manifest
from tests.orchestrate.conftest import MakeRun
from tests.orchestrate.simulation import Killed, Scheduler, lewis_like


class Cluster:
    """The simulated scheduler as an executor; `mishaps` says what happens at which submission instead."""

    name = "slurm"

    def __init__(self, run: Run) -> None:
        self.run, self.scheduler = run, Scheduler()
        self.requests: list[JobRequest] = []
        self.mishaps: dict[int, str] = {}
        self.questions = 0

    def submit(self, request: JobRequest, on_accepted: Callable[[str], None]) -> None:
        assert request.spec.path.is_file(), "a job may start at once: its spec must be there"
        assert self.run.ws.log_dir(request.spec.round, request.spec.stage).is_dir(), "without it Slurm loses the log"
        parts = (request, *request.beside)
        known = [attempt.name for attempt in Ledger(self.run.ws).history().attempts]
        assert known[-len(parts) :] == [part.spec.name for part in parts], "what is submitted was written down before"
        mishap = self.mishaps.pop(len(self.requests), "")
        self.requests.append(request)
        if mishap == "refused":
            raise ExecutorError("sbatch: error: QOSMaxSubmitJobPerUserLimit")
        if mishap == "killed before":
            raise Killed
        stage = self.run.graph[StageId(request.spec.round, request.spec.stage)]
        job_id = self.scheduler.submit(
            request.spec.name, stage, request.resources.tasks, request.after_end, request.after_start
        )
        for part in request.beside:
            id = StageId(part.spec.round, part.spec.stage)
            self.scheduler.add_component(job_id, part.spec.name, self.run.graph[id])
        if mishap == "killed after":
            raise Killed
        on_accepted(job_id)

    def queue(self, names: Iterable[str]) -> Sequence[Queued]:
        self.questions += 1
        return self.scheduler.queue(names)

    def cancel(self, names: Iterable[str], waiting_only: bool = False) -> None:
        for name in names:
            self.scheduler.cancel(name, waiting_only)

    def render(self, request: JobRequest) -> list[str]:
        return []

    def live(self) -> Counter[str]:
        """Jobs in the queue by stage."""
        names = {job.name for job in self.queue(job.name for job in self.scheduler.jobs.values())}
        return Counter(str(job.stage.id) for job in self.scheduler.jobs.values() if job.name in names)


SUBMISSIONS = 12
"""Rounds 1 and 2 of five stages and an advance each; round 0 of the no-op recipe is empty."""


def bring(run: Run, cluster: Cluster, **more: object) -> Report:
    policy = Policy.of(run.config.run)
    return reconcile(run, cluster, Path("/code"), policy, **more)  # type: ignore[arg-type]


def finish(run: Run, round: int) -> None:
    """As if all work of a round had been done."""
    for stage in run.graph.of_round(round):
        for shard in range(stage.shards if stage.has_work else 0):
            manifest.write(run.ws, Manifest(round, stage.name, shard, ()))


def test_a_fresh_run_is_submitted_with_one_question_and_one_submission_a_stage(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    report = bring(run, cluster)
    assert cluster.questions == 1
    assert len(report.submitted) == len(cluster.requests) == SUBMISSIONS
    assert set(cluster.live().values()) == {1}


def test_asked_again_it_submits_nothing(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    ledger = run.ws.ledger_path.read_bytes()
    report = bring(run, cluster)
    assert (report.submitted, report.cancelled, report.decision.status) == ({}, [], "running")
    assert run.ws.ledger_path.read_bytes() == ledger


def test_of_two_at_one_moment_one_submits_and_the_other_finds_nothing_to_do(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    start, reports = threading.Barrier(4), []

    def one() -> None:
        start.wait()
        reports.append(bring(run, cluster))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(report.submitted) for report in reports) == [0, 0, 0, SUBMISSIONS]
    assert set(cluster.live().values()) == {1}


@pytest.mark.parametrize("mishap", ["killed before", "killed after", "refused"])
@pytest.mark.parametrize("at", [0, 4, 11])
def test_ended_anywhere_the_next_call_goes_on_where_it_stood(make_run: MakeRun, mishap: str, at: int) -> None:
    run = make_run()
    cluster = Cluster(run)
    cluster.mishaps[at] = mishap
    with pytest.raises(ExecutorError if mishap == "refused" else Killed):
        bring(run, cluster)
    bring(run, cluster)
    assert set(cluster.live().values()) == {1}
    assert len(cluster.live()) == SUBMISSIONS
    again = 0 if mishap == "killed after" else 1  # an adopted job is not submitted again
    assert len(cluster.requests) == SUBMISSIONS + again
    history = Ledger(run.ws).history()
    assert [a.written_off for a in history.attempts].count(True) == (0 if mishap == "killed after" else 1)
    assert bring(run, cluster).submitted == {}


def test_an_adopted_job_is_what_the_others_wait_for(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    cluster.mishaps[0] = "killed after"
    with pytest.raises(Killed):
        bring(run, cluster)
    bring(run, cluster)
    jobs = {str(job.stage.id): job for job in cluster.scheduler.jobs.values()}
    assert jobs["round 1 grade"].after_end == {jobs["round 1 sample"].id}


def test_consumers_wait_for_the_first_replica_of_their_service_and_not_for_one_that_runs(make_run: MakeRun) -> None:
    run = replace(make_run("stages.grade.listener.tasks=3"), graph=lewis_like(1, 2))
    cluster = Cluster(run)
    bring(run, cluster)
    jobs = {str(job.stage.id): job for job in cluster.scheduler.jobs.values()}
    service, consumer = jobs["round 1 grade.listener"], jobs["round 1 grade"]
    assert service.elements == ["PENDING"] * 3
    assert consumer.after_start == {f"{service.id}_0"}
    assert jobs["round 1 evaluate"].after_start == {jobs["round 1 evaluate.listener"].id}
    service.elements[1:] = ["RUNNING", "RUNNING"]  # the first one was requeued
    consumer.elements = ["ENDED"]
    bring(run, cluster)
    (again,) = (job for job in cluster.scheduler.jobs.values() if job.stage == consumer.stage and not job.ended)
    assert again.after_start == set()


@pytest.mark.parametrize("mishap", ["", "killed before", "killed after"])
def test_a_service_in_the_job_of_its_consumer_is_written_down_and_adopted_with_it(
    make_run: MakeRun, mishap: str
) -> None:
    run = replace(make_run(), graph=lewis_like(1, 2, hetjob=True))
    cluster = Cluster(run)
    if mishap:
        cluster.mishaps[3] = mishap
        with pytest.raises(Killed):
            bring(run, cluster)
        assert [part.spec.stage for part in cluster.requests[3].beside] == ["grade.listener"]
    bring(run, cluster)
    history = Ledger(run.ws).history()
    pair = [a for stage in ("grade", "grade.listener") for a in history.of(1, stage)]
    assert [a.written_off for a in pair] == ([True, False] * 2 if mishap == "killed before" else [False] * 2)
    consumer, service = (a for a in pair if not a.written_off)
    assert consumer.job_ids == service.job_ids is not None
    assert set(cluster.live().values()) == {1}
    assert bring(run, cluster).submitted == {}
    shown = {s["stage"]: s for s in json.loads(run.ws.state_path.read_text())["rounds"][1]["stages"]}
    assert shown["grade.listener"]["job_ids"] == shown["grade"]["job_ids"]
    assert shown["grade.listener"]["state"] == "waiting"


def test_a_job_that_was_accepted_after_all_is_seen_and_its_double_cancelled(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    cluster.mishaps[0] = "killed before"
    with pytest.raises(Killed):
        bring(run, cluster)
    late = cluster.requests[-1]
    bring(run, cluster)  # writes it off and submits another one
    job_id = cluster.scheduler.submit(late.spec.name, run.graph[StageId(1, "sample")], 4, (), ())
    cluster.scheduler.jobs[job_id].elements = ["RUNNING"] * 4
    bring(run, cluster)
    assert cluster.live()["round 1 sample"] == 1
    assert bring(run, cluster).cancelled == []


def test_when_a_round_is_done_the_one_after_the_next_is_submitted(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    finish(run, 1)
    report = bring(run, cluster)
    assert {id.round for id in report.submitted} == {3}
    assert len(report.submitted) == 6


def test_a_finished_run_leaves_nothing_waiting(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    for round in (1, 2, 3):
        finish(run, round)
    assert bring(run, cluster).decision.status == "finished"
    assert not cluster.live()


def test_checkpoints_of_a_stage_whose_job_was_killed_before_it_removed_them_go(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    finish(run, 1)
    kept = [run.ws.stage_dir(round, "train") / "checkpoints" for round in (1, 2, 3)]
    for folder in kept:
        (folder / "token" / "checkpoint-3").mkdir(parents=True)
    remove_spent(run.ws, run.graph.work)
    assert [folder.exists() for folder in kept] == [False, True, True], "of a stage that is not done they are needed"
    for round in (2, 3):
        finish(run, round)
    assert bring(run, cluster).decision.status == "finished"
    assert not any(folder.exists() for folder in kept)


def test_a_paused_run_is_left_alone_until_it_is_resumed(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    Ledger(run.ws).append("paused", why="cancelled by the user")
    assert bring(run, cluster).decision.status == "paused"
    assert not cluster.requests
    assert bring(run, cluster, resume=True).decision.status == "running"
    assert len(cluster.requests) == SUBMISSIONS


def test_a_person_who_launches_is_never_told_that_it_was_tried_often_enough(make_run: MakeRun) -> None:
    run = make_run("run.max_attempts=2")
    for _ in range(4):  # each time the launcher is killed, and its jobs with it
        cluster = Cluster(run)
        assert bring(run, cluster, resume=True).decision.status == "running"
        assert cluster.live()["round 1 sample"] == 1
    assert bring(run, Cluster(run)).decision.status == "stopped"


def test_somebody_who_does_not_end_is_waited_for_in_vain_and_named(make_run: MakeRun) -> None:
    run = make_run()
    lease = acquire(run.ws.lease_folder, RECONCILE_LEASE, 60.0)
    assert lease is not None
    with lease, pytest.raises(RunBusy, match="another process has been reconciling"):
        bring(run, Cluster(run), patience_s=0.3)


@pytest.mark.parametrize("content", ["", '{"epoch": ', "[]", '{"epoch": "many"}', "null", "{}"])
def test_a_corrupt_state_file_is_rebuilt_and_said(make_run: MakeRun, content: str) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    before = atomic.read_json(run.ws.state_path)
    run.ws.state_path.write_text(content)
    report = bring(run, cluster)
    assert any("training_state.json could not be read" in note and "rebuilt" in note for note in report.notes)
    after = atomic.read_json(run.ws.state_path)
    assert after["rounds"] == before["rounds"]


def test_the_state_file_counts_its_versions_and_shows_what_was_submitted(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    bring(run, cluster)
    state = json.loads(run.ws.state_path.read_text())
    assert (state["epoch"], state["status"], state["schema"]) == (2, "running", 1)
    sample = state["rounds"][1]["stages"][0]
    assert (sample["stage"], sample["state"], sample["shards"]) == ("sample", "waiting", 4)
    assert sample["job_ids"] == [cluster.scheduler.jobs["1"].id]


def test_a_torn_ledger_line_is_said_and_its_job_adopted(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)
    text = run.ws.ledger_path.read_bytes()
    run.ws.ledger_path.write_bytes(text[:-10])  # the line with the last job's id
    report = bring(run, cluster)
    assert report.submitted == {}
    assert any("cut off by a crash" in note for note in report.notes)
    assert Ledger(run.ws).history().attempts[-1].job_ids == ("12",)


def test_looking_changes_nothing(make_run: MakeRun) -> None:
    run = make_run()
    cluster = Cluster(run)
    bring(run, cluster)

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.ws.root.rglob("*") if path.is_file()}

    before = contents()
    look(run, cluster)
    assert contents() == before


# giving up


def fail_for_good(run: Run, stage: str, attempts: int = 2) -> None:
    """As if all before a stage of round 1 were done, and its attempts had ended with the same error."""
    for before in run.graph.of_round(1):
        if before.name == stage:
            break
        for shard in range(before.shards):
            manifest.write(run.ws, Manifest(1, before.name, shard, ()))
    names = [a.name for a in Ledger(run.ws).history().of(1, stage)]
    folder = run.ws.attempts_dir(1, stage)
    for number in range(len(names) + 1, attempts + 1):
        names.append(f"late-{number}")
        fields = {"round": 1, "stage": stage, "number": number, "executor": "slurm", "depends_on": []}
        Ledger(run.ws).append("intent", name=names[-1], **fields)
        Ledger(run.ws).append("submitted", name=names[-1], job_ids=[f"9{number}"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        end = EndRecord(name, "9", 0, 0, "node1", "error", 1, "RuntimeError: bad", "x.out", 1.0, 2.0, 0.0, 0.0)
        atomic.write_json(folder / f"{name}.end-0.json", vars(end))


def without(run: Run, *optional: str) -> Run:
    """The run, with stages that it can do without."""
    stages = tuple(replace(s, optional=s.name in optional) for s in run.graph.stages)
    return replace(run, graph=replace(run.graph, stages=stages))


@pytest.mark.parametrize("killed", ["", "before the ledger", "before the manifest", "after the manifest"])
def test_what_is_given_up_is_said_in_ledger_manifest_and_state_whoever_is_killed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """S11: `auto_continue_on_failure`."""
    run = without(make_run("run.continue_on_failure=true", "run.rounds=1"), "train")
    cluster = Cluster(run)
    fail_for_good(run, "train")
    if killed:
        target = (Ledger, "append") if killed == "before the ledger" else (manifest, "write")
        real = getattr(*target)

        def kill(*given: Any, **more: Any) -> None:
            if killed == "after the manifest":
                real(*given, **more)
            raise Killed

        monkeypatch.setattr(*target, kill)
        with pytest.raises(Killed):
            bring(run, cluster)
        monkeypatch.undo()
    report = bring(run, cluster)
    assert report.decision.status == "running"
    assert [str(id) for id in report.submitted if id.name not in ("advance",)] == ["round 1 evaluate"]
    made = manifest.read(run.ws, 1, "train", 0)
    assert made.outputs == ()
    assert "failed 2 times with the same error: RuntimeError: bad" in made.made_from["given_up"]
    assert Ledger(run.ws).history().given_up == {(1, "train"): made.made_from["given_up"]}
    shown = {s["stage"]: s for s in json.loads(run.ws.state_path.read_text())["rounds"][1]["stages"]}
    assert shown["train"]["state"] == "given up"
    assert shown["train"]["last_error"] == f"given up: {made.made_from['given_up']}"
    assert shown["evaluate"]["state"] == "waiting"


def test_shards_that_are_done_stay_so_when_the_rest_is_given_up(make_run: MakeRun) -> None:
    run = without(make_run("run.continue_on_failure=true", "run.rounds=1"), "sample")
    manifest.write(run.ws, Manifest(1, "sample", 2, (), {"mine": True}))
    fail_for_good(run, "sample")
    bring(run, Cluster(run))
    assert [manifest.read(run.ws, 1, "sample", shard).made_from.get("mine", False) for shard in range(4)] == [
        False, False, True, False,
    ]  # fmt: skip


def test_a_person_who_launches_is_given_another_try_before_anything_is_given_up(make_run: MakeRun) -> None:
    run = without(make_run("run.continue_on_failure=true", "run.rounds=1"), "train")
    fail_for_good(run, "train")
    cluster = Cluster(run)
    assert StageId(1, "train") in bring(run, cluster, resume=True).submitted
    assert not Ledger(run.ws).history().given_up
    assert manifest.done_shards(run.ws, 1, "train") == set()


def test_what_only_something_given_up_needs_is_not_done_for_a_person_either(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the manifests of two stages that are given up together."""
    run = without(make_run("run.continue_on_failure=true", "run.rounds=1"), "score", "train")
    fail_for_good(run, "score")
    cluster, real = Cluster(run), manifest.write

    def kill(ws: Any, made: Manifest) -> None:
        if made.stage == "score":
            raise Killed
        real(ws, made)

    monkeypatch.setattr(manifest, "write", kill)
    with pytest.raises(Killed):
        bring(run, cluster)
    monkeypatch.undo()
    assert manifest.done_shards(run.ws, 1, "train") == {0}
    assert StageId(1, "score") not in bring(run, cluster, resume=True).submitted
    assert {stage for _, stage in Ledger(run.ws).history().given_up} == {"score", "train"}
    assert manifest.read(run.ws, 1, "score", 0).made_from["given_up"] == "what needs it was given up"


def test_a_training_that_is_given_up_names_the_round_whose_weights_stand(tmp_path: Path) -> None:
    """S8, S11: `weights_of` the round gives those."""
    file = source_root() / "configs" / "tiny" / "lewis.yaml"
    config = configs.load(file, [], {}, tmp_path / "run", cwd=source_root())
    run = open_run(config, file)
    for round in (1, 2):
        give_up(run.ws, config, run.graph[StageId(round, "train")], "it failed")
    made = manifest.read(run.ws, 2, "train", 0)
    assert (made.made_from["given_up"], made.made_from["trained_round"]) == ("it failed", 1)
    first = weights_of(run.ws, Role("speaker", config.speaker), 2)  # type: ignore[attr-defined]
    assert first.base == str(config.speaker.path) and first.adapter is None  # type: ignore[attr-defined]


def test_a_failed_attempt_is_submitted_again_with_the_pause_that_the_config_asks_for(make_run: MakeRun) -> None:
    run = make_run("run.retry_delay_s=90", "run.rounds=1")
    fail_for_good(run, "train", attempts=1)
    cluster = Cluster(run)
    said: list[str] = []
    bring(run, cluster, say=said.append)
    delays = {request.spec.stage: request.delay_s for request in cluster.requests}
    assert (delays["train"], delays["evaluate"]) == (90.0, 0.0)
    assert any("round 1 train: submitted as" in line and "to start in 90 s" in line for line in said)
