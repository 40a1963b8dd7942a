"""Services on a real cluster: moved to other nodes, replicated, in one job with their consumers, beside dead ones.

Every case disturbs a run in the middle of asking its listener and ends with the samples, or the weights, of one that
nobody disturbed; the round is not played further than that.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run import atomic
from hpc_rl.services import handoff
from hpc_rl.services.records import Endpoint
from tests.slurm.runs import ClusterRun
from tests.slurm.small_lewis import (
    GRADING_ONLY,
    TWO_RANKS,
    UNHURRIED,
    assert_grades_the_same_samples,
    in_the_middle_of_grading,
)

RunFrom = Callable[..., ClusterRun]


def published(run: ClusterRun) -> list[Endpoint]:
    """The listeners that take requests, those first that started last."""
    return sorted(handoff.discover(run.ws.service_dir("listener")), key=lambda endpoint: -endpoint.started)


def wait_for_another(run: ClusterRun, before: Endpoint) -> Endpoint:
    """The listener that comes up after `before`."""
    found = run.wait_for(lambda: [e for e in published(run) if e.started > before.started], "another listener")
    assert isinstance(found[0], Endpoint)
    return found[0]


def wait_for_the_middle_of_grading(run: ClusterRun) -> None:
    run.wait_for(in_the_middle_of_grading(run), "the first shard to be graded")


def rewards(run: ClusterRun) -> dict[tuple[int, str, str], float]:
    """What live training logged: (step, game, completion) → reward."""
    (made,) = run.manifests(1, "train")
    lines = [json.loads(line) for line in made.path("predictions.jsonl").read_text().splitlines()]
    return {(line["step"], line["id"], line["completion"]): line["reward"] for line in lines}


def lines_of_predictions(run: ClusterRun) -> int:
    """How many completions of live training have their rewards."""
    logs = run.ws.stage_dir(1, "train").glob("*.predictions.jsonl")
    return sum(path.read_text().count("\n") for path in logs)


def requeue(run: ClusterRun, *options: str) -> tuple[Endpoint, Endpoint]:
    """Requeue the listener's job; returns what it has published before and what it publishes afterwards."""
    before = published(run)[0]
    run.cluster.run(["scontrol", "requeue", before.job_id])
    for option in options:
        run.cluster.run(["scontrol", "update", f"JobId={before.job_id}", option])
    run.cluster.start_now(before.job_id)
    after = wait_for_another(run, before)
    assert (after.replica, after.job_id) == (before.replica, before.job_id), run.tool("hpc_rl.status").stdout
    assert (before.restart, after.restart) == (0, 1)
    assert after.nonce != before.nonce
    return before, after


@contextmanager
def somebody_else_on_the_port_of_a_dead_listener(run: ClusterRun) -> Iterator[list[str]]:
    """A record that a dead job left behind, by a clock minutes ahead; yields what the server at its address is sent."""
    asked: list[str] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"GET {self.path} {self.headers.get('Authorization', '')}".strip())
            body = json.dumps({"status": "ok", "nonce": "another one's"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            asked.append(f"POST {self.path}")
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, folder = server.server_address[1], run.ws.service_dir("listener")
        left = handoff.publish(folder, "listener", "job-1", "node2", port, job_id="1", heartbeat_s=3600)
        record = {**atomic.read_json(left.path), "started": time.time() - 3600, "heartbeat": time.time() + 300}
        atomic.write_json(left.path, record)
        yield asked
        server.shutdown()


def test_a_listener_moves_to_another_node_while_grading_and_a_dead_one_has_left_its_record(
    run_from: RunFrom, undisturbed: ClusterRun
) -> None:
    run = run_from("sample", settings=(*UNHURRIED, *GRADING_ONLY, "stages.grade.listener.sbatch={exclude: node1}"))
    with somebody_else_on_the_port_of_a_dead_listener(run) as asked:
        run.launch()
        wait_for_the_middle_of_grading(run)
        before, after = requeue(run, f"ExcNodeList={published(run)[0].host}")
        assert before.host != after.host
        assert_grades_the_same_samples(run, undisturbed)
    assert set(asked) <= {"GET /health"}, "it was sent more than the question who it is"
    assert asked, "nobody looked at the record"
    assert run.submissions()[1, "grade.listener"] == 1


@pytest.mark.slow
def test_a_listener_moves_to_another_node_while_a_live_trainer_asks_it(run_from: RunFrom) -> None:
    soon = "services.listener.client.chunk_delay_s=0.25"  # live training asks more often
    live = (*UNHURRIED, soon, *TWO_RANKS, "train.rollouts=live", "stages.train.listener.sbatch={exclude: node1}")
    together = (
        "services.listener.placement=hetjob"  # nothing to do with moving: a job of two nodes and one is tried too
    )
    calm = run_from(folder="calm", settings=(*live, together))
    calm.launch()
    calm.wait_for(lambda: calm.manifests(1, "train"), "the undisturbed training")
    calm.tool("hpc_rl.cancel")
    calm.cluster.wait_for_empty_queue()
    moved = run_from(folder="moved", settings=live)
    moved.launch()
    moved.wait_for(lambda: lines_of_predictions(moved), "the first step")
    assert not moved.manifests(1, "train"), "too late to disturb anything"
    before, after = requeue(moved, f"ExcNodeList={published(moved)[0].host}")
    assert before.host != after.host
    moved.wait_for(lambda: moved.manifests(1, "train"), "the training that was disturbed")
    assert rewards(moved) == rewards(calm)
    (trained,), (expected,) = moved.manifests(1, "train"), calm.manifests(1, "train")
    assert trained.metrics["ranks"] == expected.metrics["ranks"] == 2
    assert calm.attempts(1, "train")[0].job_ids == calm.attempts(1, "train.listener")[0].job_ids
    assert trained.made_from["weights_out"] == expected.made_from["weights_out"]


def test_a_listener_in_one_job_with_its_consumer(run_from: RunFrom, undisturbed: ClusterRun) -> None:
    run = run_from("sample", settings=(*UNHURRIED, *GRADING_ONLY, "services.listener.placement=hetjob"))
    run.launch()
    wait_for_the_middle_of_grading(run)
    (grade,), (listener,) = run.attempts(1, "grade"), run.attempts(1, "grade.listener")
    assert grade.job_ids == listener.job_ids
    jobs = {job.name: job for job in run.cluster.queue("--states=RUNNING")}
    assert jobs[listener.name].nodes == "node4" != jobs[grade.name].nodes
    first = published(run)[0]
    run.kill_body("jobs.serve")
    again = wait_for_another(run, first)
    assert (again.host, again.restart) == (first.host, 0), "it starts again in place"
    # what comes before the time limit: the consumer leaves, is served until then, and has their job run again
    run.cluster.run(["scancel", "--signal=USR2", again.job_id])
    after = wait_for_another(run, again)
    assert (after.job_id, after.restart) == (again.job_id, 1)
    assert_grades_the_same_samples(run, undisturbed)
    assert run.submissions()[1, "grade"] == run.submissions()[1, "grade.listener"] == 1
    assert {made.job_id for made in run.manifests(1, "grade")} == set(grade.job_ids or ())
    run.wait_for(lambda: grade.name not in {job.name for job in run.cluster.queue()}, "the job to end")
    ends = {s: end_records(run.ws, StageId(1, s)) for s in ("grade", "grade.listener")}
    assert [end.outcome for end in ends["grade"]] == ["left", "done"]
    assert (ends["grade.listener"][0].outcome, ends["grade.listener"][0].restart) == ("killed", 0)


def test_a_replica_that_is_lost_for_good_while_grading(run_from: RunFrom, undisturbed: ClusterRun) -> None:
    """Each of the two takes all GPUs of a node."""
    listener = "stages.grade.listener={tasks: 2, gpus_per_node: 2, ranks_per_node: 1, sbatch: {exclude: node1}}"
    run = run_from("sample", settings=(*UNHURRIED, *GRADING_ONLY, listener, "stages.grade.sbatch={hold: true}"))
    run.launch()
    replicas = run.wait_for(lambda: len(published(run)) == 2 and published(run), "both replicas")
    run.cluster.run(["scontrol", "release", *(run.attempts(1, "grade")[0].job_ids or ())])
    assert len({endpoint.host for endpoint in replicas}) == 2
    wait_for_the_middle_of_grading(run)
    token = handoff.read_token(run.ws.service_dir("listener"))

    def batches() -> list[int]:
        asks = [["curl", "-s", "-H", f"Authorization: Bearer {token}", f"{e.url}/health"] for e in replicas]
        return [json.loads(run.cluster.run(ask).stdout)["counters"]["batches"] for ask in asks]

    run.wait_for(lambda: all(batches()), "both to be asked")
    (attempt,) = run.attempts(1, "grade.listener")
    first = f"{(attempt.job_ids or ('',))[0]}_0"
    assert first in {endpoint.job_id for endpoint in replicas}
    run.cluster.run(["scancel", first])
    assert len(run.manifests(1, "grade")) < 8, "too late to disturb anything"
    assert_grades_the_same_samples(run, undisturbed)
    assert run.submissions()[1, "grade.listener"] == run.submissions()[1, "grade"] == 1
