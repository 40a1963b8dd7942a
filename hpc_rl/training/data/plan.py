"""Which unit of data is trained on in which step, on which rank, in which forward pass: decided before training.

All data are there and every rank reads the same, so every rank can work the whole plan out and takes its own part.
Nothing depends on what happens while training, so a resumed job goes on exactly where the checkpoint was made. A plan
is an order of the round's units; steps and batches are cut from it when their turn comes. What is in a step depends on
its size alone, not on how it is spread over ranks and forward passes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from hpc_rl.run.seeds import derive
from hpc_rl.training.data.units import Units

U = TypeVar("U")


@dataclass(frozen=True)
class Shape:
    """Size of an optimizer step: ranks × forward passes on each × units in each."""

    ranks: int
    accumulation: int
    batch: int

    @property
    def samples(self) -> int:
        """Units in a full optimizer step."""
        return self.ranks * self.accumulation * self.batch


@dataclass(frozen=True, eq=False)
class Item(Generic[U]):
    """A unit in a batch.

    Attributes
    ----------
    unit, place
        The unit, and its number among all: where arrays over all units have what belongs to it.
    weight
        0 for a filler: it is there because every rank must make a forward pass, and has no part in the loss.
    """

    unit: U
    place: int
    weight: int = 1


@dataclass(frozen=True, eq=False)
class Step(Generic[U]):
    """One optimizer step.

    Attributes
    ----------
    units, shape
        Where its units are, and how they are dealt out.
    places
        (n,) which of them, in order; none in a step that is there beside another plan's.
    """

    units: Units[U]
    shape: Shape
    places: NDArray[np.int64]

    @cached_property
    def index(self) -> NDArray[Any]:
        """(n,) what is known of its units without reading them."""
        return self.units.index[self.places]

    def total(self, column: str) -> int:
        """Sum of a column of the index: tokens, for example."""
        return int(self.index[column].sum(dtype=np.int64))

    @property
    def items(self) -> tuple[Item[U], ...]:
        """All units of the step, without fillers."""
        return self._items(self.places)

    def batch(self, rank: int, number: int) -> tuple[Item[U], ...]:
        """The units of one forward pass of a rank; one filler where there is none for it."""
        own = self.places[self._own(rank, number)]
        return self._items(own) if len(own) else (self._filler,)

    def rows(self, number: int) -> tuple[int, ...]:
        """By rank how many units a forward pass has, fillers not counted."""
        spans = [self._own(rank, number) for rank in range(self.shape.ranks)]
        return tuple(span.stop - span.start for span in spans)

    def share(self, rank: int, number: int) -> float:
        """What a mean over the units of a forward pass is multiplied by, so that the mean over all passes of the step
        is that over all of its units; 0 for a filler."""
        own = self._own(rank, number)
        return float((own.stop - own.start) * self.shape.accumulation * self.shape.ranks / (len(self.places) or 1))

    def _own(self, rank: int, number: int) -> slice:
        start, end = _share(0, len(self.places), self.shape.ranks, rank)
        return slice(*_share(start, end, self.shape.accumulation, number))

    def _items(self, places: NDArray[np.int64]) -> tuple[Item[U], ...]:
        return tuple(Item(unit, int(place)) for unit, place in zip(self.units.rows(places), places, strict=True))

    @cached_property
    def _filler(self) -> Item[U]:
        among = self.places if len(self.places) else np.arange(len(self.units))
        shortest = among[[int(np.argmin(self.units.index["length"][among]))]]
        return Item(self.units.rows(shortest)[0], int(shortest[0]), 0)


class Plan(Sequence[Step[U]]):
    """The optimizer steps of a round, each made when it is asked for; the one asked for last is kept.

    Parameters
    ----------
    units, shape
        What is trained on, in steps of which size.
    orders
        For each epoch (N,) the units in the order in which they have their turn.
    steps
        In how many steps they are dealt out.
    passes
        How many steps in a row use the same units.
    """

    def __init__(
        self, units: Units[U], shape: Shape, orders: Sequence[NDArray[np.int64]], steps: int, passes: int = 1
    ) -> None:
        self.units, self.shape = units, shape
        self._orders, self._steps, self._passes = orders, steps, passes
        self._last: tuple[int, Step[U]] | None = None

    def __len__(self) -> int:
        return self._steps * len(self._orders) * self._passes

    @overload
    def __getitem__(self, number: int) -> Step[U]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Step[U]]: ...
    def __getitem__(self, number: int | slice) -> Step[U] | Sequence[Step[U]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"step {number} of {len(self)}")
        part = number // self._passes
        if self._last is None or self._last[0] != part:
            self._last = part, self._step(part)
        return self._last[1]

    def _step(self, part: int) -> Step[U]:
        epoch, number = divmod(part, self._steps)
        own = slice(*_share(0, len(self.units), self._steps, number))
        return Step(self.units, self.shape, self._orders[epoch][own])

    def total(self, column: str) -> int:
        """Sum of a column of the index over all steps: tokens, for example."""
        return int(self.units.index[column].sum(dtype=np.int64)) * len(self._orders) * self._passes

    def fingerprint(self) -> str:
        """Equal for equal plans of equal data: a checkpoint of another plan cannot be continued.

        Of the shape only the size of a step counts, so a checkpoint can be continued in smaller forward passes.
        """
        digest = hashlib.sha256(f"{self.units.digest} {self.shape.samples} {self._steps} {self._passes}".encode())
        for order in self._orders:
            digest.update(self.units.index["id_hash"][order].tobytes())
        return digest.hexdigest()


def make(
    units: Units[U], shape: Shape, *, epochs: int, run_seed: int, round: int, passes: int = 1, steps: int | None = None
) -> Plan[U]:
    """Lay a round's units out in optimizer steps.

    Groups come in a seeded order, the units of a group side by side. An epoch's units are dealt out evenly over as
    few steps as hold them, so that none is dropped and no step is much smaller than the others. Where all groups are
    complete and fill the steps, each step holds whole groups.

    Parameters
    ----------
    epochs
        How often the round's units are gone through.
    passes
        How many optimizer steps in a row use the same units (μ in the GRPO paper).
    steps
        Deal an epoch's units out over so many steps instead: of more steps than units some stay empty.

    Raises
    ------
    ValueError
        When a step would not hold its units.
    """
    firsts, sizes = units.starts[:-1], np.diff(units.starts)
    orders = []
    for epoch in range(epochs):
        groups = list(range(len(sizes)))
        random.Random(derive(run_seed, round, "train", epoch)).shuffle(groups)
        ends = np.cumsum(sizes[groups])
        within = np.arange(len(units)) - np.repeat(ends - sizes[groups], sizes[groups])
        orders.append(np.repeat(firsts[groups], sizes[groups]) + within)
    fewest = ceil(len(units) / shape.samples)
    if steps is not None and steps < fewest:
        raise ValueError(f"{len(units)} units in steps of up to {shape.samples} cannot be dealt out over {steps} steps")
    return Plan(units, shape, orders, steps or fewest, passes)


def in_order(units: Units[U], shape: Shape) -> Plan[U]:
    """All units once, in their own order: for a pass that only looks at them."""
    return Plan(units, shape, [np.arange(len(units))], ceil(len(units) / shape.samples))


def _share(start: int, end: int, parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `parts` of a run of units starts and ends; lengths differ by one at most."""
    return start + (end - start) * number // parts, start + (end - start) * (number + 1) // parts
