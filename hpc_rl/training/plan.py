"""Which sample is trained on in which optimizer step, on which rank, in which forward pass: decided before training.

Sampling is over and every rank reads the same samples, so every rank can work the whole plan out and takes its own
part. Nothing depends on what happens while training, so a resumed job goes on exactly where the checkpoint was made. A
plan is an order of the round's samples, and an advantage for each; steps and batches are cut from it when their turn
comes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hpc_rl.run.seeds import derive
from hpc_rl.training.rollouts import Rollout, Rollouts, Scale, advantages, by_batch, have_equal_rewards


@dataclass(frozen=True)
class Shape:
    """Size of an optimizer step: ranks × forward passes on each × samples in each."""

    ranks: int
    accumulation: int
    batch: int

    @property
    def samples(self) -> int:
        """Samples in a full optimizer step."""
        return self.ranks * self.accumulation * self.batch


@dataclass(frozen=True, eq=False)
class Item:
    """A sample in a batch. A filler (weight 0) is there for the batch's shape only and has no part in the loss."""

    rollout: Rollout
    advantage: float
    weight: int = 1


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step.

    Attributes
    ----------
    rollouts, shape
        Where its samples are, and how they are dealt out.
    places
        (n,) which samples of `rollouts`, in order.
    advantages
        (n,) what each of them is worth against its group.
    equal_groups
        Share of its groups whose rewards are all equal.
    """

    rollouts: Rollouts
    shape: Shape
    places: NDArray[np.int64]
    advantages: NDArray[np.float64]
    equal_groups: float

    @cached_property
    def samples(self) -> NDArray[Any]:
        """(n,) of `rollouts.index_dtype`: what is known of its samples."""
        return self.rollouts.index[self.places]

    @property
    def tokens(self) -> int:
        """Sampled tokens in the whole step."""
        return int(self.samples["tokens"].sum())

    @property
    def items(self) -> tuple[Item, ...]:
        """All samples of the step, without fillers."""
        return self._items(slice(None))

    def batch(self, rank: int, number: int) -> tuple[Item, ...]:
        """The items of one forward pass of a rank; fillers, where it has no samples of its own to fill the batch."""
        start, end = _share(0, len(self.places), self.shape.ranks, rank)
        own = slice(*_share(start, end, self.shape.accumulation, number))
        items = self._items(own)
        missing = self.shape.batch - len(items)
        return items + (self._filler,) * missing if missing else items

    def _items(self, own: slice) -> tuple[Item, ...]:
        rollouts = self.rollouts.rows(self.samples[own])
        return tuple(Item(r, float(value)) for r, value in zip(rollouts, self.advantages[own], strict=True))

    @cached_property
    def _filler(self) -> Item:
        shortest = int(np.argmin(self.samples["prompt_tokens"] + self.samples["tokens"]))
        return Item(self.rollouts.rows(self.samples[shortest : shortest + 1])[0], 0.0, 0)


class Plan(Sequence[Step]):
    """The optimizer steps of a round, each made when it is asked for; the one asked for last is kept.

    Parameters
    ----------
    rollouts, shape
        What is trained on, in steps of which size.
    orders
        For each epoch (N,) the samples in the order in which they have their turn.
    passes
        How many steps in a row use the same samples.
    """

    def __init__(
        self, rollouts: Rollouts, shape: Shape, orders: Sequence[NDArray[np.int64]], passes: int, scale: Scale
    ) -> None:
        self.shape = shape
        self._rollouts, self._orders, self._passes, self._scale = rollouts, orders, passes, scale
        self._parts = ceil(len(rollouts) / shape.samples)
        self._rewards = rollouts.rewards
        self._advantages = advantages(self._rewards, rollouts.starts, scale)
        self._equal = have_equal_rewards(self._rewards, rollouts.starts)
        self._last: tuple[int, Step] | None = None

    def __len__(self) -> int:
        return self._parts * len(self._orders) * self._passes

    @overload
    def __getitem__(self, number: int) -> Step: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Step]: ...
    def __getitem__(self, number: int | slice) -> Step | Sequence[Step]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"step {number} of {len(self)}")
        part = number // self._passes
        if self._last is None or self._last[0] != part:
            self._last = part, self._step(part)
        return self._last[1]

    def _step(self, part: int) -> Step:
        epoch, place = divmod(part, self._parts)
        places = self._orders[epoch][slice(*_share(0, len(self._rollouts), self._parts, place))]
        worth = self._advantages[places]
        if self._scale == "batch":
            worth = by_batch(worth, self._rewards[places])
        groups = np.unique(np.searchsorted(self._rollouts.starts, places, side="right") - 1)
        return Step(self._rollouts, self.shape, places, worth, float(self._equal[groups].mean()))

    @property
    def tokens(self) -> int:
        """Sampled tokens of all steps."""
        return int(self._rollouts.index["tokens"].sum(dtype=np.int64)) * len(self._orders) * self._passes

    def fingerprint(self) -> str:
        """Equal for equal plans: a checkpoint of another plan cannot be continued."""
        digest = hashlib.sha256(f"{self.shape} {self._passes} {self._scale} {self._rollouts.weights_hash}".encode())
        for order in self._orders:
            for name in ("id_hash", "reward"):
                digest.update(self._rollouts.index[name][order].tobytes())
        return digest.hexdigest()


def make(
    rollouts: Rollouts, shape: Shape, *, epochs: int, passes: int, scale: Scale, run_seed: int, round: int
) -> Plan:
    """Lay a round's samples out in optimizer steps.

    Groups come in a seeded order, the samples of a group side by side. An epoch's samples are dealt out evenly over as
    few steps as hold them, so that no sample is dropped and no step is much smaller than the others. Where all groups
    are complete and fill the steps, each step holds whole groups.

    Parameters
    ----------
    epochs
        How often the round's samples are gone through.
    passes
        How many optimizer steps in a row use the same samples (μ in the GRPO paper).
    scale
        `train.scale_rewards`.
    """
    firsts, sizes = rollouts.starts[:-1], np.diff(rollouts.starts)
    orders = []
    for epoch in range(epochs):
        groups = list(range(len(sizes)))
        random.Random(derive(run_seed, round, "train", epoch)).shuffle(groups)
        ends = np.cumsum(sizes[groups])
        within = np.arange(len(rollouts)) - np.repeat(ends - sizes[groups], sizes[groups])
        orders.append(np.repeat(firsts[groups], sizes[groups]) + within)
    return Plan(rollouts, shape, orders, passes, scale)


def _share(start: int, end: int, parts: int, number: int) -> tuple[int, int]:
    """Where part `number` of `parts` of a run of samples starts and ends; lengths differ by one at most."""
    return start + (end - start) * number // parts, start + (end - start) * (number + 1) // parts
