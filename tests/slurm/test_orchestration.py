"""The orchestration on a real cluster, with jobs that do nothing: what happens when launch or advance is killed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import REPOSITORY, ClusterRun

CONFIG = "benchmarks/noop.yaml"
STAGES = ("sample", "grade", "score", "train", "evaluate")
FAST = ("run.lease_ttl_s=3", "run.gate_patience_s=2", "run.rounds=2", "stages.sample.tasks=2")
ONE_ROUND = "run.rounds=1"

Make = Callable[..., ClusterRun]


@pytest.fixture
def make_run(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Make]:
    def make(*settings: str, folder: str = "run") -> ClusterRun:
        return ClusterRun(cluster, tmp_path / folder, CONFIG, [*FAST, *settings])

    yield make
    shutil.rmtree(tmp_path, ignore_errors=True)


def assert_each_stage_was_done_once(run: ClusterRun, rounds: int = 2) -> None:
    for round in range(1, rounds + 1):
        for stage in STAGES:
            assert len(run.manifests(round, stage)) == (4 if stage == "sample" else 1)
            assert len(run.attempts(round, stage)) == 1, run.tool("hpc_rl.status").stdout


def test_launch_returns_while_the_run_has_hardly_begun_and_the_run_finishes_by_itself(make_run: Make) -> None:
    run = make_run("stages.sample.tasks=4", "cluster.max_array_size=3")  # an array is split where Slurm would refuse it
    said = run.launch().stdout
    assert "you can log off" in said and str(run.ws.root) in said
    assert not run.manifests(1, "evaluate")
    (sample,) = run.attempts(1, "sample")
    assert sample.job_ids and len(sample.job_ids) == 2 and sample.job_ids[0] in said
    run.wait_until_finished()
    assert_each_stage_was_done_once(run)
    assert {m.host for m in run.manifests(1, "sample")} <= set(run.cluster.nodes)
    run.wait_for(lambda: not run.cluster.queue(), "the spare advance to be gone")
    assert "finished" in run.launch().stdout


def test_of_two_launches_at_the_same_moment_one_submits_every_stage_once_and_a_later_one_changes_nothing(
    make_run: Make,
) -> None:
    run = make_run(ONE_ROUND)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    both = [run.cluster.popen(run.launch_command(), cwd=REPOSITORY, env=run.env, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("you can log off" in text for text in said) == 1, said
    assert sum("already running" in text for text in said) == 1, said
    before = run.ws.ledger_path.read_text()
    later = run.launch().stdout
    assert "already running" in later and "Nothing was changed" in later
    # whatever the ledger has now came from the run's own advance jobs
    added = run.ws.ledger_path.read_text()[len(before) :]
    assert '"round": 1, "stage": "sample"' not in added
    run.wait_until_finished()
    assert_each_stage_was_done_once(run, rounds=1)


def test_a_launch_killed_around_its_sbatch_is_repeated_without_loss_or_double(make_run: Make) -> None:
    runs = {when: make_run(folder=when) for when in ("before", "after")}
    for when, run in runs.items():
        happened = run.kill_at_next_sbatch(when)
        assert run.launch(check=False).returncode != 0
        assert happened()
        (attempt,) = run.attempts(1, "sample")
        assert attempt.job_ids is None
        run.launch()
    for when, run in runs.items():
        run.wait_until_finished()
        submitted = run.submissions()
        assert all(submitted[1, stage] == 1 for stage in STAGES), submitted
        for round in (1, 2):
            assert len(run.manifests(round, "sample")) == 4
        adopted = '"adopted": true' in run.ws.ledger_path.read_text()
        assert adopted == (when == "after")


@pytest.mark.parametrize(
    "cases",
    [
        [(3, "before"), (2, "after")],
        pytest.param([(3, "after"), (2, "before")], marks=pytest.mark.slow),
    ],
    ids=["once each", "the other way round"],
)
def test_an_advance_killed_around_its_sbatch_is_replaced_by_the_spare(
    make_run: Make, cases: list[tuple[int, str]]
) -> None:
    """Launch queues rounds 1 and 2; the first advance submits round 3, or, where there is none, the last spare."""
    runs = [make_run(f"run.rounds={rounds}", folder=f"{rounds}-{when}") for rounds, when in cases]
    happened = []
    for run, (_, when) in zip(runs, cases, strict=True):
        run.launch()
        happened.append(run.kill_at_next_sbatch(when))
    for run, (rounds, _), was_killed in zip(runs, cases, happened, strict=True):
        run.wait_until_finished()
        assert was_killed(), "nobody called sbatch any more: the test came too late"
        done = [run.manifests(round, stage) for round in range(1, rounds + 1) for stage in STAGES]
        assert [len(made) for made in done] == [4, 1, 1, 1, 1] * rounds
        (code,) = run.ws.code_dir.iterdir()
        assert {m.made_from["code"] for made in done for m in made} == {code.name}, "also what advance has submitted"


def test_an_advance_that_is_cancelled_in_the_queue_is_replaced_by_the_spare(make_run: Make) -> None:
    run = make_run()
    run.launch()
    (advance,) = run.attempts(1, "advance")
    run.cluster.run(["scancel", f"--name={advance.name}"])
    run.wait_until_finished()
    assert_each_stage_was_done_once(run)


def test_cancel_takes_exactly_this_runs_jobs_and_launch_goes_on(make_run: Make) -> None:
    run = make_run(ONE_ROUND)
    other = run.cluster.sbatch("--wrap=sleep 300", f"--output={run.folder}/other.out")
    run.launch()
    run.wait_for(lambda: run.manifests(1, "sample"), "the first shard")
    said = run.tool("hpc_rl.cancel").stdout
    assert "paused" in said
    run.wait_for(lambda: [job.id for job in run.cluster.queue()] == [other], "only the other job to be left")
    assert run.status()["status"] == "paused"
    run.launch()
    run.wait_until_finished()
    assert run.cluster.state(other) == "RUNNING"


def test_slurm_is_asked_about_partitions_and_accounts_before_anything_is_written(make_run: Make) -> None:
    run = make_run("cluster.partition=gpu-a100", "stages.train.account=nobodys")
    refused = run.launch(check=False)
    assert refused.returncode == 2
    assert "no partition 'gpu-a100'" in refused.stderr and "main" in refused.stderr and "nobodys" in refused.stderr
    assert not run.ws.root.exists() and not run.cluster.queue()
