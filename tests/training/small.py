"""A trainer of a bag of words: what all trainers share, in milliseconds a step. Not a test module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hpc_rl.cluster.walltime import Deadline
from hpc_rl.config.training import TrainConfig
from hpc_rl.training.base import UNITS, Driven, Tensors
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.checkpointing.saving import Saving
from hpc_rl.training.checkpointing.sealing import Sealing
from hpc_rl.training.ranks.leaving import Leaving

ACCUMULATION = 2
STEPS = 6


class Words(torch.nn.Module):
    """Least squares on the mean of word vectors, with dropout, so that random states count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors, self.layer = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 1)
        self.dropout = torch.nn.Dropout(0.2)

    def forward(self, input_ids: torch.Tensor, y: torch.Tensor) -> Mapping[str, torch.Tensor]:
        found = self.layer(self.dropout(self.vectors(input_ids).mean(1))).squeeze(-1)
        return {"loss": (found - y).square().mean()}


class Batches:
    """Forward passes of three units each; a unit's words follow from its number. What `bad` ones ask is no number."""

    def __init__(self, rank: int = 0, bad: Collection[str] = ()) -> None:
        self._rank, self._bad = rank, bad

    def loader(self) -> DataLoader[Tensors]:
        return DataLoader(range(STEPS * ACCUMULATION), batch_size=1, collate_fn=self._batch)

    def _batch(self, numbers: list[int]) -> Tensors:
        units = [f"unit-{self._rank}-{numbers[0]}-{row}" for row in range(3)]
        made = torch.Generator().manual_seed(100 * self._rank + numbers[0])
        words = torch.randint(50, (3, 4), generator=made)
        y = words.sum(-1) / 100 * torch.tensor([float("nan") if unit in self._bad else 1.0 for unit in units])
        return {"input_ids": words, "y": y, UNITS: units}


class Small(Driven, Trainer):  # type: ignore[misc]
    """The trainer."""


def trainer(
    checkpoints: Checkpoints,
    batches: Batches | None = None,
    *,
    options: TrainConfig | None = None,
    deadline: Deadline | None = None,
    rank: int = 0,
    leaving: Leaving | None = None,
    model: torch.nn.Module | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    kind: Callable[..., Small] = Small,
) -> Small:
    """A trainer whose checkpoints are made as those of a training job are."""
    options = options or TrainConfig(save_steps=2)
    args = TrainingArguments(
        output_dir=str(checkpoints.own), use_cpu=True, save_strategy="no", num_train_epochs=1, learning_rate=0.05,
        gradient_accumulation_steps=ACCUMULATION, per_device_train_batch_size=3, logging_steps=1, report_to="none",
        disable_tqdm=True, remove_unused_columns=False, logging_nan_inf_filter=False, deepspeed=deepspeed,
    )  # fmt: skip
    seal = Sealing(checkpoints, rank == 0, 0.0)
    saving = Saving(
        options,
        leaving or Leaving(),
        deadline or Deadline(),
        seal.check_room,
        stage="train",
        device=torch.device("cpu"),
    )
    made = kind(model=model or Words(), args=args, batches=batches or Batches(rank), seal=seal, callbacks=[saving])
    made.saving = saving
    return made


def opened(folder: Path, token: str = "a") -> Checkpoints:
    """Checkpoints of a claim that begins."""
    made = Checkpoints(folder, token, "same work")
    made.create()
    return made


def weights(made: Small) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def losses(made: Small) -> dict[int, float]:
    """The loss of each step that was logged."""
    return {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}
