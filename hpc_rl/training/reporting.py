"""What a training job says while it works: TensorBoard, the log, progress for `status`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
