"""After running out of memory: smaller forward passes, the same optimizer step, and the checkpoint before goes on."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import LEAVE_AT
from hpc_rl.config.training import GrpoTrainConfig, TrainConfig
from hpc_rl.engines.memory import notches_of
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.reporting.gather import gather
from hpc_rl.reporting.text import lowered
from hpc_rl.run import atomic
from hpc_rl.run.workspace import Workspace
from hpc_rl.training import memory
from tests.training.conftest import NewRun
from tests.training.test_ranks import checkpoints, differ, here


@given(batch=st.integers(1, 300), accumulation=st.integers(1, 40))
def test_a_step_stays_the_same_down_to_one_unit_in_a_pass(batch: int, accumulation: int) -> None:
    settings = TrainConfig(per_device_batch_size=batch, gradient_accumulation_steps=accumulation)
    most = memory.most_notches(settings)
    sizes = []
    for notches in range(most + 2):
        found = memory.lowered(settings, notches)
        assert found.per_device_batch_size * found.gradient_accumulation_steps == batch * accumulation
        sizes.append(found.per_device_batch_size)
    assert sizes[0] == batch and sizes[-2:] == [1, 1]
    assert sizes[:-1] == sorted(set(sizes), reverse=True), "each time less"


def test_it_is_halved_where_it_can_be_and_nothing_else_changes() -> None:
    settings = GrpoTrainConfig(per_device_batch_size=12, gradient_accumulation_steps=2, epsilon=0.3)
    assert [memory.lowered(settings, n).per_device_batch_size for n in range(5)] == [12, 6, 3, 1, 1]
    same = {"per_device_batch_size": 12, "gradient_accumulation_steps": 2}
    assert memory.lowered(settings, 2).model_copy(update=same) == settings


def ran_out_of_memory(ws: Workspace, attempt: str = "train-a1") -> None:
    """The end record of a job that said so."""
    now = time.time()
    end = EndRecord(
        attempt, "7", 0, 0, "node1", "out of memory", 1, "torch.OutOfMemoryError: CUDA out of memory", "logs/x.out",
        now - 60, now, 1.0, 0.0,
    )  # fmt: skip
    atomic.write_json(ws.attempts_dir(1, "train") / f"{attempt}.end-7-0-{int(now)}-memory.json", asdict(end))


def test_the_next_attempt_takes_half_as_many_units_at_once_and_goes_on_from_the_checkpoint(
    new_run: NewRun, plain: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first attempt leaves for want of time after one step; the second runs out of memory; the third ends."""
    ws = new_run()
    monkeypatch.setenv(LEAVE_AT, f"{time.time() + 0.1:.0f}")
    with pytest.raises(SystemExit) as leave:
        here(ws)
    assert leave.value.code == EXIT_OUT_OF_TIME and checkpoints(ws) == ["checkpoint-1"]
    monkeypatch.delenv(LEAVE_AT)

    ran_out_of_memory(ws)
    made = here(ws)
    assert "after running out of memory once: train.per_device_batch_size 4 instead of 8" in caplog.text
    assert "gradient_accumulation_steps 2 instead of 1; an optimizer step is the same" in caplog.text
    numbers = made.metrics
    assert (numbers["resumed_from_step"], numbers["steps"], numbers["memory_notches"]) == (1, 6, 1)
    assert (numbers["per_device_batch_size"], numbers["gradient_accumulation_steps"]) == (4, 2)
    assert differ(plain, ws) < 2e-4, "sums in another order; Adam enlarges rounding where gradients are near 0"
    assert notches_of(ws, 2, "train") == 1, "the next rounds begin with it"
    (training,) = gather(Run.load(ws.root)).trainings
    told = lowered(training)
    assert told.startswith("round 1 train: after running out of memory once, per_device_batch_size 4 and gradient_acc")
