"""One rank's forward passes of a plan, as tensors: made when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hpc_rl.training.base import ROWS, SHARE, UNITS, Tensors
from hpc_rl.training.data.plan import Item, Plan, Step

Maker = Callable[[Step[Any], Sequence[Item[Any]]], Tensors]
"""Makes some of the tensors of a forward pass, from its optimizer step and its units: see `collate`."""


class Batches(Dataset[Tensors]):
    """One rank's forward passes of a plan, in order.

    Each is a dict with the tensors of all makers, and `units`, ids for messages, `share` and `rows`
    (`Step.share`, `Step.rows`).

    Parameters
    ----------
    plan, rank
        Whose part of which plan.
    makers
        What makes their tensors.
    """

    def __init__(self, plan: Plan[Any], rank: int, *makers: Maker) -> None:
        self._plan, self._rank, self._makers = plan, rank, makers

    def __len__(self) -> int:
        return len(self._plan) * self._plan.shape.accumulation

    def __getitem__(self, number: int) -> Tensors:
        step, turn = divmod(number, self._plan.shape.accumulation)
        return self._batch(self._plan[step], turn)

    def loader(self) -> DataLoader[Tensors]:
        """Batches in order; a resumed training skips those that it has done without making them."""
        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=_only)

    def _batch(self, step: Step[Any], turn: int) -> Tensors:
        items = step.batch(self._rank, turn)
        made: Tensors = {
            UNITS: [item.unit.id for item in items], SHARE: step.share(self._rank, turn), ROWS: step.rows(turn),
        }  # fmt: skip
        for maker in self._makers:
            made |= maker(step, items)
        return made


def _only(batch: list[Tensors]) -> Tensors:
    return batch[0]
