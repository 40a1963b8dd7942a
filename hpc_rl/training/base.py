"""What all trainers share: batches that a plan laid out, checkpoints that are sealed, an end where numbers end.

TRL's trainers load, shuffle and shard data by themselves. Here a plan has decided all of that
(`hpc_rl.training.data.plan`), so `Driven` puts its batches in the place of theirs; losses, optimizers and DeepSpeed are
TRL's and transformers'.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from hpc_rl.training.errors import CheckpointFailed, Diverged
from hpc_rl.training.ranks.distributed import all_gather_objects
from hpc_rl.training.ranks.uneven import uneven_rows
from hpc_rl.training.reporting.reporter import Reporter

Tensors = dict[str, Any]
Passes = list[tuple[torch.Tensor, tuple[str, ...]]]
"""Forward passes of an optimizer step: whether the loss of each was finite, and what was in it."""

UNITS = "units"
"""Key of a batch: ids of what is in it, for messages. It goes no further than the trainer."""
SHARE = "share"
"""Key of a batch: what a mean over its rows is multiplied by, so that all rows of the optimizer step count alike. It is
1 where every forward pass of the step is full, and 0 for one that has only a filler."""
ROWS = "rows"
"""Key of a batch: by rank the units of this pass, 0 where there is only a filler."""
IN_MODEL_DTYPE = ("pixel_values",)
"""Keys of a batch that take the model's number type under DeepSpeed; log-probabilities need all of float32."""
NAMED = 8
"""Units of a rank that a message names at most."""


class Loads(Protocol):
    """A rank's batches."""

    def loader(self) -> DataLoader[Tensors]:
        """In order; a resumed training skips those that it has done without making them."""


class Driven:
    """Mixin for trainers of TRL, before them in the list of bases.

    Parameters
    ----------
    batches
        This rank's batches; None where TRL makes them (live rollouts).
    seal
        Called on all ranks after all have written their part of a checkpoint, with its folder.
    reporter
        What is told of batches, steps and their cost; None where nobody listens.

    Attributes
    ----------
    mean_over_rows
        Whether TRL's loss of a forward pass is a mean over its rows (and not a sum over tokens of the whole step): then
        it is multiplied by the batch's share.
    """

    mean_over_rows = True
    args: Any
    state: Any
    accelerator: Any

    def __init__(
        self, *, batches: Loads | None, seal: Callable[[Path], None], reporter: Reporter | None = None, **trl: Any
    ) -> None:
        self._batches, self._seal, self._reporter = batches, seal, reporter or Reporter()
        self._units: tuple[str, ...] = ()
        self._share = 1.0
        self._rows: tuple[int, ...] = ()
        self._passes: Passes = []
        super().__init__(**trl)
        self.add_callback(self._reporter)  # type: ignore[attr-defined]
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """What TRL would tokenise; here it is a stand-in whose columns alone are looked at."""
        return dataset

    def get_train_dataloader(self) -> DataLoader[Tensors]:
        """This rank's batches, in order, and not TRL's."""
        if self._batches is None:
            loader: DataLoader[Tensors] = super().get_train_dataloader()  # type: ignore[misc]
            return loader
        return self._batches.loader()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Tensors to the device."""
        if self._batches is None:
            made = super()._prepare_inputs(inputs)  # type: ignore[misc]
            self._reporter.saw(self, made, ())
            return made
        self._reporter.saw(self, inputs, tuple(inputs.get(UNITS, ())))
        moved = {
            name: value.to(self.accelerator.device) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        self._units, self._share = tuple(moved.pop(UNITS, ())), float(moved.pop(SHARE, 1.0))
        self._rows = tuple(moved.pop(ROWS, ()))
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            dtype = self.args.hf_deepspeed_config.dtype()
            moved |= {name: moved[name].to(dtype) for name in IN_MODEL_DTYPE if name in moved}
        return moved

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; before the last pass of an optimizer step goes backward, all of its losses are finite.

        DeepSpeed takes the step within that `backward`. Nothing is asked of other ranks before: once a step is enough.

        Raises
        ------
        Diverged
            On all ranks, before any weight was changed.
        """
        with uneven_rows(self.accelerator, self._rows):
            found = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = found[0] if isinstance(found, tuple) else found
        self._passes.append((torch.isfinite(loss.detach()).all(), self._units))
        if self.accelerator.sync_gradients:
            passes, self._passes = self._passes, []
            check_losses(passes, self.accelerator, f"the loss of step {self.state.global_step + 1}")
        if not self.mean_over_rows:
            return found
        scaled = loss * self._share
        return (scaled, *found[1:]) if isinstance(found, tuple) else scaled

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradients, the same on all ranks; a step along what is no number is not saved.

        Without DeepSpeed they are found before the step. DeepSpeed leaves such a step out and goes on, for ever if need
        be (runtime/zero, `overflow`): that is how the loss scale of float16 is found, else it ends here.

        Raises
        ------
        Diverged
            On all ranks.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if self.args.fp16:
            return norm
        if not math.isfinite(float(norm)):
            raise Diverged(
                f"the gradients of step {self.state.global_step + 1} are not finite, though its losses are. This "
                f"rank's last batch has {_named(self._units)}"
            )
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's numbers of a step, and what it has cost."""
        costs = self._reporter.measured(self) if "loss" in logs else {}
        super().log({**logs, **costs}, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' own: TRL's writes a model card first, for the hub. Then it is sealed.

        Raises
        ------
        CheckpointFailed
            When a file cannot be written, on the rank that cannot; the others find that it is gone.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with self._reporter.saving():
            try:
                Trainer._save_checkpoint(self, model, trial)
                self._save_more(folder)
            except (OSError, RuntimeError, SafetensorError) as error:
                free, said = (
                    shutil.disk_usage(self.args.output_dir).free / 1e9,
                    (str(error) or repr(error)).splitlines(),
                )
                raise CheckpointFailed(f"{folder} cannot be written, with {free:.3g} GB free: {said[0]}") from error
            self._seal(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' own, for checkpoints; nothing with DeepSpeed, whose shards hold the weights and are read alone.

        It would gather all weights in rank 0's memory (ZeRO-3) and write them a second time, while the others wait.
        """
        if not self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_more(self, folder: Path) -> None:
        """For trainers with more state than transformers knows of: write it below `folder`, on all ranks."""


class CountsTokens:
    """Mixin before TRL's trainers that count tokens themselves (`num_tokens`): a resumed training counts on.

    TRL keeps the number in an attribute, which begins at 0 again; here it is in the trainer's state, as GRPO's is.
    """

    state: Any

    @property
    def _total_train_tokens(self) -> int:
        return int(self.state.num_input_tokens_seen)

    @_total_train_tokens.setter
    def _total_train_tokens(self, tokens: int) -> None:
        self.state.num_input_tokens_seen = tokens


def check_losses(passes: Passes, accelerator: Any, what: str) -> None:
    """Refuse an optimizer step with a loss that is no number. All ranks must call it.

    Parameters
    ----------
    passes
        Of this rank: whether the loss of a forward pass was finite, and what was in it.
    what
        Whose loss of which step, for the message.

    Raises
    ------
    Diverged
        On all ranks.
    """
    fine = torch.stack([finite for finite, _ in passes]).all()
    if bool(accelerator.gather(fine.reshape(1)).all()):
        return
    ours = [f"forward pass {n}: {_named(units)}" for n, (finite, units) in enumerate(passes) if not finite]
    ranks = [f"rank {rank}, {'; '.join(said)}" for rank, said in enumerate(all_gather_objects(ours)) if said]
    raise Diverged(f"{what} is not finite on {' | '.join(ranks)}")


def _named(units: tuple[str, ...]) -> str:
    more = f" and {len(units) - NAMED} more" if len(units) > NAMED else ""
    return f"{', '.join(units[:NAMED])}{more}" if units else "no named units"
