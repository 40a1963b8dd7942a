"""What a training job says while it works: TensorBoard, the log, progress for `status`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpc_rl.training.reporting.samples_log import Samples
from hpc_rl.training.reporting.throughput import Meter

log = logging.getLogger(__name__)

IN_THE_LOG = {
    "loss": "loss", "reward": "reward", "rewards/accuracy/mean": "accuracy", "rewards/accuracies": "accuracy",
    "kl": "KL", "clip_ratio/region_mean": "clipped", "sampling/logprob_difference_mean": "Δ log p",
    "completions/mean_length": "length", "learning_rate": "lr", "throughput/tokens_per_s": "tokens/s",
    "throughput/mfu_percent": "MFU %", "memory/gpu_peak_gib": "GPU GiB", "throughput/step_s": "s",
}  # fmt: skip


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Writes each logged step to TensorBoard (`train/...`) and the log, and keeps the numbers.

    Parameters
    ----------
    tensorboard
        Folder of the event files (rank 0); None = none.
    progress
        Called with steps done and steps in all.
    samples
        Texts of the batches.
    """

    def __init__(
        self,
        tensorboard: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        samples: Samples | None = None,
    ) -> None:
        self.history: list[dict[str, float]] = []
        self._folder, self._progress, self._samples = tensorboard, progress, samples or Samples()
        self._meter, self._logged_step = Meter(), 0
        self._writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open TensorBoard. Points that a killed attempt wrote beyond its last checkpoint are hidden."""
        self._logged_step = state.global_step
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)
        self._meter.begin()

    def saw(self, trainer: Any, batch: Mapping[str, Any], units: tuple[str, ...]) -> None:
        """Take note of what one forward pass is made of; see `Samples.saw`."""
        self._meter.count(batch)
        self._samples.saw(batch, units, trainer.state.global_step + 1, trainer.processing_class)

    def saving(self) -> AbstractContextManager[None]:
        """While a checkpoint is written: that is no part of a step."""
        return self._meter.paused()

    def measured(self, trainer: Any) -> dict[str, float]:
        """What steps have cost since it was asked last. All ranks must call it, where transformers logs."""
        steps, self._logged_step = trainer.state.global_step - self._logged_step, trainer.state.global_step
        return self._meter.measured(trainer, steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        processing_class: Any = None,
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
            for number, row in enumerate(self._samples.take(processing_class)):
                self._writer.add_text(f"texts/{number}", row.markdown(), state.global_step)
        said = ", ".join(f"{word} {numbers[name]:.4g}" for name, word in IN_THE_LOG.items() if name in numbers)
        log.info("step %d of %d: %s", state.global_step, state.max_steps, said)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell `status`. The last step is logged in any case: the manifest says how a training ended."""
        control.should_log |= state.global_step == state.max_steps
        self._progress(state.global_step, state.max_steps)

    def add(self, group: str, found: Mapping[int, Mapping[str, float]]) -> None:
        """Write numbers by step that were measured once training was over: TensorBoard (`group/...`) and the log."""
        for step, numbers in found.items():
            log.info("%s, step %d: %s", group, step, ", ".join(f"{name} {n:.4g}" for name, n in numbers.items()))
        if self._folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self._folder)) as writer:
            for step, numbers in found.items():
                for name, value in numbers.items():
                    writer.add_scalar(f"{group}/{name}", value, step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close TensorBoard."""
        if self._writer is not None:
            self._writer.close()
