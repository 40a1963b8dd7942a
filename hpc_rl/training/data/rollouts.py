"""A round's graded samples as groups with advantages: what is trained on, and what is left out and counted.

A group is what one role says about one prompt: roles that answer the same prompt are not compared (V12). A sample whose
grading failed is left out (L11). Its group keeps the others: mean and deviation are over those present, and the missing
one simply is no row of any batch, since batches are made of samples and not of whole groups
(`hpc_rl.training.data.plan`). A group with fewer than two samples left says nothing about better or worse and is
dropped.

A round may have a million samples. What planning needs of each is a row of one array (`index_columns`); its tokens stay
on disk until its batch comes (`hpc_rl.training.data.rows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpc_rl.training.data.units import Units
from hpc_rl.training.errors import NothingToLearn

EPSILON = 1e-4
"""Added to the deviation that rewards are divided by (L15)."""

EQUAL = 1e-8
"""Rewards that differ by less are equal."""

Scale = Literal["group", "batch", "none"]


def index_columns(parts: Sequence[str]) -> list[Any]:
    """What the index has of a sample besides `units.INDEX`.

    Numbers of the prompt, the role (`Rollouts.roles`) and the attempt, lengths, what it is worth, by part too.
    """
    return [
        ("group", np.int32), ("role", np.int16), ("attempt", np.int32), ("prompt_tokens", np.int32),
        ("tokens", np.int32), ("finished", np.bool_), ("reward", np.float32),
        *((f"reward_{part}", np.float32) for part in parts),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled completion with its reward.

    Attributes
    ----------
    id, row_id, group, role, attempt
        The sample, its row of the data set, the prompt's number in the round, who said it, the sample's number among
        those that this role drew for the prompt. Numbers of attempts that were not accepted are missing.
    prompt_ids, token_ids
        (P,) and (T,) int32: what the engine read, image tokens expanded, and what it sampled, end token included.
    logprobs
        (T,) float32: log-probabilities with which the tokens were sampled.
    finished
        False where the completion was cut off at its longest length.
    parts
        Parts of the reward, not weighted.
    reward
        Σ weight · part.
    """

    id: str
    row_id: str
    group: int
    role: str
    attempt: int
    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool
    parts: Mapping[str, float]
    reward: float


def advantages(rewards: NDArray[np.float64], starts: NDArray[np.int64], scale: Scale = "group") -> NDArray[np.float64]:
    """Advantages A = (r − mean) / (std + 1e-4) within groups (L15; Shao et al. 2024, eq. 3 and section 4.1.2).

    Parameters
    ----------
    rewards
        (N,) rewards, group after group.
    starts
        (G + 1,) where each group starts, and N.
    scale
        What r − mean is divided by. group: the group's deviation (of a sample, n − 1, as in TRL). none: nothing. batch:
        nothing yet; the batch's deviation (`by_batch`) follows when its samples are known.

    Returns
    -------
    (N,) advantages.
    """
    sizes = np.diff(starts)
    centred: NDArray[np.float64] = rewards - np.repeat(np.add.reduceat(rewards, starts[:-1]) / sizes, sizes)
    if scale != "group":
        return centred
    deviations = np.sqrt(np.add.reduceat(centred**2, starts[:-1]) / (sizes - 1))
    scaled: NDArray[np.float64] = centred / np.repeat(deviations + EPSILON, sizes)
    return scaled


def by_batch(centred: NDArray[np.float64], rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Advantages of some samples of an optimizer step, divided by the deviation of all its rewards."""
    return centred / ((float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0) + EPSILON)


def have_equal_rewards(rewards: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(G,) True for groups in which no sample is better than another.

    All advantages are 0, and the group carries no gradient (L15). Arguments as those of `advantages`.
    """
    least = np.minimum.reduceat(rewards, starts[:-1])
    equal: NDArray[np.bool_] = np.maximum.reduceat(rewards, starts[:-1]) - least < EQUAL
    return equal


@dataclass(frozen=True)
class Counts:
    """What became of the samples of a round.

    Attributes
    ----------
    samples
        Those that were accepted and graded.
    left_out
        Those without a reward, because grading failed (L11).
    groups, dropped_groups
        Prompts of the round, by role, and those with fewer than two samples left.
    short_groups
        Groups that are used although some of their samples are missing.
    equal_groups
        Used groups whose rewards are all equal (L15).
    """

    samples: int
    left_out: int
    groups: int
    dropped_groups: int
    short_groups: int
    equal_groups: int


@dataclass(frozen=True, eq=False)
class Rollouts(Units[Rollout]):
    """All that a round trains on: samples, ordered by prompt, role and attempt; a group is a prompt and a role.

    Attributes
    ----------
    roles
        Names of the roles, by number.
    parts
        Names of the parts of the reward (L10).
    counts, weights_hash
        What became of all samples; what they were drawn with.
    means
        Of the index's rewards, by column, before groups were left out. None: none were.
    """

    roles: Sequence[str]
    parts: Sequence[str]
    counts: Counts
    weights_hash: str
    means: Mapping[str, float] | None = field(default=None, kw_only=True)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """(N,) rewards."""
        return self.index["reward"].astype(np.float64)

    @property
    def groups(self) -> Iterator[Sequence[Rollout]]:
        """The samples of one prompt and role after the other, two or more each, read as they are asked for."""
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.rows(slice(start, end))

    def mean(self, part: str | None = None) -> float:
        """Mean of a part of the reward, or of its total, over the round: also of groups that were left out since."""
        column = "reward" if part is None else f"reward_{part}"
        return float(self.index[column].mean(dtype=np.float64)) if self.means is None else self.means[column]

    def share_of_equal(self, places: NDArray[np.int64]) -> float:
        """Share of groups whose rewards are all equal, among the groups that some samples are of."""
        groups = np.unique(np.searchsorted(self.starts, places, side="right") - 1)
        return float(self._equal[groups].mean())

    @cached_property
    def _equal(self) -> NDArray[np.bool_]:
        return have_equal_rewards(self.rewards, self.starts)

    def with_rewards(self, rewards: NDArray[Any]) -> Rollouts:
        """The same samples, worth something else.

        Parameters
        ----------
        rewards
            (N,) of them.
        """
        index = self.index.copy()
        index["reward"] = rewards
        equal = int(have_equal_rewards(index["reward"].astype(np.float64), self.starts).sum())
        digest = hashlib.sha256(self.digest.encode() + index["reward"].tobytes()).hexdigest()
        return replace(self, index=index, digest=digest, counts=replace(self.counts, equal_groups=equal))

    def without_equal_groups(self) -> Rollouts:
        """Only the groups in which some sample is better than another; `counts.equal_groups` says how many others.

        Raises
        ------
        NothingToLearn
            When there is none.
        """
        equal = self._equal
        if not equal.any():
            return self
        if equal.all():
            raise NothingToLearn(
                f"the rewards are equal within each of the {len(equal)} groups, so no sample is better than another: "
                f"mean reward {self.mean():.4g}, "
                + ", ".join(f"{part} {self.mean(part):.4g}" for part in self.parts)
                + ". Look at the samples: are the tasks too hard or too easy, or is the grading broken?"
            )
        sizes = np.diff(self.starts)
        starts = np.concatenate(([0], np.cumsum(sizes[~equal])))
        means = {"reward": self.mean(), **{f"reward_{part}": self.mean(part) for part in self.parts}}
        return replace(self, index=self.index[np.repeat(~equal, sizes)], starts=starts, means=means)
