"""Every algorithm on a real cluster, two nodes with two ranks each, killed in the middle: the loss curve is the same.

All trainings are stages of one run. Each is disturbed once, in a way of clusters, as soon as it has a
checkpoint; reconciling has it go on. Its losses, step by step over both attempts, are those of one process that nobody
disturbs (tests/training/pool.py).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl.training.checkpointing.checkpoints import COMPLETE
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import ClusterRun
from tests.training.algorithms_recipe import FILES
from tests.training.pool import open_run_of_one, train_all

CONFIG = "tests/slurm/algorithms.yaml"


def kill_a_rank(run: ClusterRun, algorithm: str) -> None:
    """kill -9, as by an administrator or the kernel; not the first one, which knows most."""
    ranks = [process for _, process in run.bodies("jobs.train") if f"train_{algorithm}" in process.argv]
    os.kill(ranks[-1].pid, signal.SIGKILL)


def cancel(run: ClusterRun, algorithm: str) -> None:
    """What PreemptMode=CANCEL does."""
    run.cluster.run(["scancel", job_of(run, algorithm)])


def requeue(run: ClusterRun, algorithm: str) -> None:
    """What PreemptMode=REQUEUE does without a grace time."""
    run.cluster.run(["scontrol", "requeue", job_of(run, algorithm)])


def warn(run: ClusterRun, algorithm: str) -> None:
    """What Slurm does before a job's time limit."""
    run.cluster.run(["scancel", "--signal=USR2", job_of(run, algorithm)])


def job_of(run: ClusterRun, algorithm: str) -> str:
    (attempt,) = run.attempts(1, f"train_{algorithm}")
    return (attempt.job_ids or ("",))[0]


DISTURB: dict[str, Callable[[ClusterRun, str], None]] = {
    "dpo": warn, "grpo": kill_a_rank, "joint": cancel,
    "sft": requeue, "weighted_sft": kill_a_rank, "rloo": warn, "reward_model": cancel,
}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ["dpo"],
        pytest.param(["grpo", "joint"], marks=pytest.mark.slow),
        pytest.param(["sft", "weighted_sft"], marks=pytest.mark.slow),
        pytest.param(["rloo", "reward_model"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_every_algorithm_goes_on_as_if_nothing_had_happened(
    cluster: SlurmCluster, tmp_path: Path, names: list[str]
) -> None:
    assert DISTURB.keys() == FILES.keys()
    alone = train_all(open_run_of_one(tmp_path, *(f"{name}.epochs=3" for name in names)), names)
    run = ClusterRun(cluster, tmp_path, CONFIG, [f"model.path={tmp_path / 'model'}", f"algorithms={json.dumps(names)}"])
    run.launch()
    waiting = set(names)

    def disturb() -> bool:
        for name in sorted(waiting):
            folder = run.ws.stage_dir(1, f"train_{name}")
            if any(folder.glob(f"checkpoints/*/*/{COMPLETE}")):
                DISTURB[name](run, name)
                waiting.remove(name)
        return not waiting

    run.wait_for(disturb, "every training to have a checkpoint", timeout_s=600)
    run.wait_until_finished()
    for name in names:
        (made,) = run.manifests(1, f"train_{name}")
        assert made.metrics["ranks"] == 4 and 0 < made.metrics["resumed_from_step"] < made.metrics["steps"], name
        assert losses(run.ws.tb_dir / "round_01" / f"train_{name}") == pytest.approx(
            dict(enumerate(alone[name]["losses"], 1)), abs=1e-5, rel=1e-4
        ), name
        assert made.metrics["preflight"]["bytes_per_s"].keys() == {f"inside {made.host}", "all ranks"}


def losses(folder: Path) -> dict[int, float]:
    """By step, as TensorBoard shows them; what a killed attempt did beyond its last checkpoint is hidden."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}
