"""A Lewis run of one small round, and what its disturbed copies are compared by: their samples and rewards."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.parquet as pq

from hpc_rl.orchestrate.gate import is_at_work
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.run import manifest
from tests.slurm.runs import ClusterRun

CONFIG = "tests/slurm/lewis.yaml"
SMALL = (
    "run.rounds=1",
    "sample.engine=transformers",  # starts faster than vLLM; the slow test of test_lewis.py has the real engine
    "sample.prompts_per_round=32",
    "sample.samples_per_prompt=4",
    "sample.shard_size=4",
    "data.categories=[ring, square]",
    "data.scenes.views_train=4",
    "data.scenes.views_test=4",
    "data.train_rows=64",
    "data.eval_rows={new_views: 24, validation: 24}",
    "stages.prepare.tasks=1",
    # one rank, which starts faster; cases about training have TWO_RANKS
    "stages.train.nodes=1",
    "train.per_device_batch_size=32",
)
TWO_RANKS = ("stages.train.nodes=2", "train.per_device_batch_size=16")
UNHURRIED = (
    "services.listener.client.chunk_size=8",
    "services.listener.client.chunk_delay_s=1",
    "services.listener.client.parallel_calls=1",
)
"""A shard takes a second to be graded, so that the middle of grading can be met on a busy machine too."""

SAMPLING_ONLY = ("stages.grade.sbatch={hold: true}", "stages.grade.listener.sbatch={hold: true}")
"""What comes after sampling is submitted, and never starts."""
GRADING_ONLY = ("stages.train.sbatch={hold: true}",)
"""What comes after grading is submitted, and never starts."""

Samples = dict[str, tuple[tuple[int, ...], float]]


def drawn_by(run: ClusterRun) -> dict[str, tuple[int, ...]]:
    """sample id → token ids. Fails when an id occurs twice."""
    found: dict[str, tuple[int, ...]] = {}
    for made in run.manifests(1, "sample"):
        for row in pq.read_table(made.path("samples.parquet")).to_pylist():
            assert row["sample_id"] not in found, f"{row['sample_id']} was drawn twice"
            found[row["sample_id"]] = tuple(row["token_ids"])
    return found


def samples_of(run: ClusterRun, round: int = 1) -> Samples:
    """sample id → (token ids, reward). Fails when an id occurs twice."""
    found: Samples = {}
    for made in run.manifests(round, "grade"):
        for row in pq.read_table(made.path("graded.parquet")).to_pylist():
            assert row["sample_id"] not in found, f"{row['sample_id']} was counted twice"
            assert not row["left_out"], row["sample_id"]
            found[row["sample_id"]] = (tuple(row["token_ids"]), row["reward"])
    return found


def assert_grades_the_same_samples(run: ClusterRun, undisturbed: ClusterRun) -> None:
    run.wait_until_finished(enough=lambda: len(manifest.done_shards(run.ws, 1, "grade")) == 8)
    expected, found = samples_of(undisturbed), samples_of(run)
    assert len(expected) == 32 * 4
    assert found == expected


def assert_draws_the_same_samples(run: ClusterRun, undisturbed: ClusterRun) -> None:
    run.wait_until_finished(enough=lambda: len(manifest.done_shards(run.ws, 1, "sample")) == 8)
    expected, found = drawn_by(undisturbed), drawn_by(run)
    assert len(expected) == 32 * 4
    assert found == expected


def in_the_middle_of_grading(run: ClusterRun) -> Callable[[], bool]:
    """Whether some of the eight shards are graded.

    Raises
    ------
    AssertionError
        When all are: nothing can be disturbed any more.
    """

    def check() -> bool:
        graded = len(run.manifests(1, "grade"))
        assert graded < 8, "too late to disturb anything"
        return graded >= 1

    return check


def holds_a_shard(run: ClusterRun, stage: str) -> Callable[[], bool]:
    """Whether some task of a stage is in the middle of a shard."""
    declared = Stage(StageId(1, stage), f"jobs.{stage}", Kind.ARRAY)
    return lambda: is_at_work(run.ws, declared, 60.0)
