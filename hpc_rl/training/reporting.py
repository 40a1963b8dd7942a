"""What a training job says while it works: TensorBoard, the log, progress for `status`; when it saves and leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpc_rl.training.leaving import Leaving

log = logging.getLogger(__name__)

IN_THE_LOG = {
    "loss": "loss", "reward": "reward", "rewards/accuracy/mean": "accuracy", "kl": "KL",
    "clip_ratio/region_mean": "clipped", "sampling/logprob_difference_mean": "Δ log p",
    "completions/mean_length": "length", "learning_rate": "lr",
}  # fmt: skip


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Writes each logged step to TensorBoard (`train/...`) and the log, and keeps the numbers (rank 0).

    Parameters
    ----------
    tensorboard
        Folder of the event files; None = none.
    progress
        Called with steps done and steps in all.
    """

    def __init__(self, tensorboard: Path | None, progress: Callable[[int, int], None]) -> None:
        self.history: list[dict[str, float]] = []
        self._folder, self._progress = tensorboard, progress
        self._writer: Any = None
        self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open TensorBoard. Points that a killed attempt wrote beyond its last checkpoint are hidden."""
        self._last = time.monotonic()
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write one step down."""
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in numbers:
            return  # the summary at the end
        self.history.append(numbers)
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"train/{name}", value, state.global_step)
        said = ", ".join(f"{word} {numbers[name]:.4g}" for name, word in IN_THE_LOG.items() if name in numbers)
        now = time.monotonic()
        log.info("step %d of %d: %s, %.2f s", state.global_step, state.max_steps, said, now - self._last)
        self._last = now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell `status`."""
        self._progress(state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close TensorBoard."""
        if self._writer is not None:
            self._writer.close()


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for a checkpoint every so many steps, and, once any rank was told to leave, for one and the end (all ranks).

    After the last step there is none: the final weights follow at once.

    Attributes
    ----------
    leave
        Training ended before its last step because a rank was told to leave.
    """

    def __init__(self, every: int, leaving: Leaving, device: torch.device) -> None:
        self._every, self._leaving, self._device = every, leaving, device
        self.leave = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide, the same on every rank."""
        self.leave = self._any_rank(self._leaving.asked) and state.global_step < state.max_steps
        if self.leave:
            control.should_training_stop = True
            log.info("told to leave; saving at step %d", state.global_step)
        due = state.global_step % self._every == 0 and state.global_step < state.max_steps
        control.should_save = self.leave or due
        return control

    def _any_rank(self, asked: bool) -> bool:
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return asked
        flag = torch.tensor(int(asked), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
