"""Which sample is trained on in which optimizer step, on which rank, in which forward pass: decided before training.

Sampling is over and every rank reads the same files, so every rank can work the whole plan out and takes its own part.
Nothing depends on what happens while training, so a resumed job goes on exactly where the checkpoint was made.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import TypeVar

import numpy as np

from hpc_rl.run.seeds import derive
from hpc_rl.training.rollouts import Group, Rollout, Rollouts, Scale, batch_deviation

T = TypeVar("T")


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
    batches
        For each rank, for each forward pass, its items.
    tokens
        Sampled tokens in the whole step.
    equal_groups
        Share of its groups whose rewards are all equal.
    """

    batches: tuple[tuple[tuple[Item, ...], ...], ...]
    tokens: int
    equal_groups: float

    @property
    def items(self) -> tuple[Item, ...]:
        """All samples of the step, without fillers."""
        return tuple(item for rank in self.batches for batch in rank for item in batch if item.weight)


@dataclass(frozen=True, eq=False)
class Plan:
    """The optimizer steps of a round."""

    shape: Shape
    steps: tuple[Step, ...]

    def fingerprint(self) -> str:
        """Equal for equal plans: a checkpoint of another plan cannot be continued."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for step in self.steps:
            for item in step.items:
                digest.update(f"{item.rollout.id} {item.advantage:.6g}\n".encode())
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
    steps: list[Step] = []
    for epoch in range(epochs):
        order = list(rollouts.groups)
        random.Random(derive(run_seed, round, "train", epoch)).shuffle(order)
        flat = [(group, rollout) for group in order for rollout in group.rollouts]
        for part in _evenly(flat, ceil(len(flat) / shape.samples)):
            steps += [_step(part, shape, scale)] * passes
    return Plan(shape, tuple(steps))


def _step(part: Sequence[tuple[Group, Rollout]], shape: Shape, scale: Scale) -> Step:
    deviation = batch_deviation([rollout.reward for _, rollout in part])
    groups = {id(group): group for group, _ in part}
    advantages = {
        rollout.id: float(value)
        for group in groups.values()
        for rollout, value in zip(group.rollouts, group.advantages(scale, deviation), strict=True)
    }
    items = [Item(rollout, advantages[rollout.id]) for _, rollout in part]
    filler = Item(min((item.rollout for item in items), key=lambda r: len(r.prompt_ids) + len(r.token_ids)), 0.0, 0)
    batches = tuple(
        tuple(tuple(_filled(cell, shape.batch, filler)) for cell in _evenly(share, shape.accumulation))
        for share in _evenly(items, shape.ranks)
    )
    return Step(
        batches,
        tokens=sum(len(item.rollout.token_ids) for item in items),
        equal_groups=float(np.mean([group.has_equal_rewards for group in groups.values()])),
    )


def _filled(cell: Sequence[Item], size: int, filler: Item) -> list[Item]:
    return [*cell, *[filler] * (size - len(cell))]


def _evenly(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """`items` in `parts` runs whose lengths differ by one at most."""
    ends = [len(items) * n // parts for n in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(ends)]
