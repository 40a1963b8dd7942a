"""ProSetting on a real cluster: three rounds, in which a sampling task, a teacher and the training are killed."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hpc_rl.orchestrate.gate import is_at_work
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import Run
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import ClusterRun

CONFIG = "tests/slurm/prosetting.yaml"
QUICK = ("sample.engine=transformers",)  # starts faster than vLLM


def at_work(run: ClusterRun, round: int, stage: str) -> bool:
    """Whether some task of a stage is in the middle of a shard."""
    return is_at_work(run.ws, Run.load(run.ws.root).graph[StageId(round, stage)], 60.0)


def accuracies(run: ClusterRun, *rounds: int) -> list[float]:
    """pass@1 after these rounds."""
    return [run.manifests(round, "evaluate")[0].metrics["accuracy"] for round in rounds]


def assert_every_question_was_asked_once(run: ClusterRun, round: int) -> None:
    """Each question of the round's pool has its 8 attempts, all of them graded, whoever died."""
    (pool,) = run.manifests(round - 1, "pool")
    ids = pq.read_table(pool.path("questions.parquet"))["question_id"].to_pylist()
    graded = [row for m in run.manifests(round, "grade") for row in pq.read_table(m.path("graded.parquet")).to_pylist()]
    assert [(row["row_id"], row["attempt"]) for row in graded] == [(id, n) for id in ids for n in range(8)]
    assert not any(row["left_out"] for row in graded)


def test_a_round_that_collects_after_the_launcher_is_gone(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Attempts, grades, pairs and the next pool, over several nodes, with both teachers on one of their own."""
    run = ClusterRun(cluster, tmp_path, CONFIG, [*QUICK, "run.rounds=1"])
    run.launch()
    run.wait_until_finished()
    assert_every_question_was_asked_once(run, 1)
    assert {made.host for made in run.manifests(1, "grade")}.isdisjoint({"node4"})  # where the teachers are
    (pairs,), (pool,) = run.manifests(1, "dpo_data"), run.manifests(1, "pool")
    assert pairs.metrics["pairs_train"] > 0 and pool.metrics["broken"] == 3
    assert set(run.submissions().values()) == {1}, "nobody was killed, so everything was submitted once"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_rounds_lift_pass_at_1_from_below_30_to_above_70_percent(
    cluster: SlurmCluster, tmp_path: Path, seed: int
) -> None:
    """On vLLM. The first seed is disturbed: a sampling task, a teacher and the training are killed in the middle."""
    run = ClusterRun(cluster, tmp_path, CONFIG, [f"run.seed={seed}"])
    run.launch()
    if seed == 0:
        run.kill_body("jobs.sample", lambda: at_work(run, 1, "collect"))
        run.kill_body("jobs.serve", lambda: run.bodies("jobs.prosetting.grade"))
        run.kill_body("jobs.train", lambda: any((run.ws.stage_dir(2, "train") / "checkpoints").rglob("checkpoint-*")))
    run.wait_until_finished(1500)
    for round in (1, 2, 3):
        assert_every_question_was_asked_once(run, round)
    before, last = accuracies(run, 0, 3)
    assert before < 0.3 and last > 0.7, (before, last)
