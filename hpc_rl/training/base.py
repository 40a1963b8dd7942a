"""What all trainers share: batches that a plan laid out, checkpoints that are sealed, an end where numbers end.

TRL's trainers load, shuffle and shard data by themselves. Here a plan has decided all of that (`hpc_rl.training.plan`),
so `Driven` puts its batches in the place of theirs; losses, optimizers and DeepSpeed are TRL's and transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from hpc_rl.training.errors import Diverged

Tensors = dict[str, Any]

UNITS = "units"
"""Key of a batch: ids of what is in it, for messages. It goes no further than the trainer."""
SHARE = "share"
"""Key of a batch: what a mean over its rows is multiplied by, so that all rows of the optimizer step count alike. It is
1 where every forward pass of the step is full, and 0 for one that has only a filler."""
IN_MODEL_DTYPE = ("pixel_values",)
"""Keys of a batch that take the model's number type under DeepSpeed; log-probabilities need all of float32."""


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

    def __init__(self, *, batches: Loads | None, seal: Callable[[Path], None], **trl: Any) -> None:
        self._batches, self._seal = batches, seal
        self._units: tuple[str, ...] = ()
        self._share = 1.0
        super().__init__(**trl)
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
            return super()._prepare_inputs(inputs)  # type: ignore[misc]
        moved = {
            name: value.to(self.accelerator.device) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }
        self._units, self._share = tuple(moved.pop(UNITS, ())), float(moved.pop(SHARE, 1.0))
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            dtype = self.args.hf_deepspeed_config.dtype()
            moved |= {name: moved[name].to(dtype) for name in IN_MODEL_DTYPE if name in moved}
        return moved

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and on no rank one that is not finite: DeepSpeed would take the step within `backward`.

        Raises
        ------
        Diverged
            On all ranks, before anything was changed.
        """
        found = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = found[0] if isinstance(found, tuple) else found
        finite = self.accelerator.gather(torch.isfinite(loss.detach()).all().reshape(1)).tolist()
        if not all(finite):
            ours = f"; this rank's batch has {', '.join(self._units[:4])}" if self._units else ""
            ranks = ", ".join(str(rank) for rank, fine in enumerate(finite) if not fine)
            raise Diverged(f"the loss of step {self.state.global_step + 1} is not finite on rank {ranks}{ours}")
        if not self.mean_over_rows:
            return found
        scaled = loss * self._share
        return (scaled, *found[1:]) if isinstance(found, tuple) else scaled

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' own: TRL's writes a model card first, for the hub. Then it is sealed."""
        Trainer._save_checkpoint(self, model, trial)
        self._seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
