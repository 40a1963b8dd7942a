"""A round's graded samples as groups with advantages: what is trained on, and what is left out and counted.

A sample whose grading failed is left out (L11). Its group keeps the others: mean and deviation are over those present,
and the missing one simply is no row of any batch, since batches are made of samples and not of whole groups
(`hpc_rl.training.plan`). A group with fewer than two samples left says nothing about better or worse and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PARTS = ("accuracy", "format", "length")
"""Parts of the reward, columns `reward_<part>` (L10)."""

EPSILON = 1e-4
"""Added to the deviation that rewards are divided by (L15)."""

Scale = Literal["group", "batch", "none"]


class UnusableRollouts(ValueError):
    """Graded samples that cannot be trained on; the message names the sample."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled completion with its reward.

    Attributes
    ----------
    id, row_id, group, attempt
        The sample, its row of the data set, the prompt's number in the round, the sample's number among those drawn
        for the prompt. Numbers of attempts that were not accepted are missing.
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
    attempt: int
    prompt_ids: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finished: bool
    parts: Mapping[str, float]
    reward: float


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one prompt that can be compared, two or more, by attempt."""

    rollouts: tuple[Rollout, ...]

    @property
    def rewards(self) -> NDArray[np.float64]:
        """(G,) rewards."""
        return np.array([rollout.reward for rollout in self.rollouts])

    @property
    def has_equal_rewards(self) -> bool:
        """True when no sample is better than another: all advantages are 0, and the group carries no gradient (L15)."""
        return bool(np.ptp(self.rewards) < 1e-8)

    def advantages(self, scale: Scale = "group", deviation: float = 0.0) -> NDArray[np.float32]:
        """(G,) advantages A = (r − mean) / (std + 1e-4) of the group (L15; Shao et al. 2024, eq. 3 and section 4.1.2).

        Parameters
        ----------
        scale
            What r − mean is divided by: the group's deviation (of a sample, n − 1, as in TRL), `deviation`, or nothing.
        deviation
            The batch's, for `scale="batch"`.
        """
        rewards = self.rewards
        centred = rewards - rewards.mean()
        if scale == "none":
            divisor = 1.0
        else:
            divisor = (float(rewards.std(ddof=1)) if scale == "group" else deviation) + EPSILON
        return np.asarray(centred / divisor, dtype=np.float32)


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
        Prompts of the round, and those with fewer than two samples left.
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
class Rollouts:
    """All that a round trains on, in order of groups."""

    groups: tuple[Group, ...]
    counts: Counts
    weights_hash: str

    def __len__(self) -> int:
        return sum(len(group.rollouts) for group in self.groups)

    def mean(self, part: str | None = None) -> float:
        """Mean of a part of the reward, or of its total."""
        all = [rollout for group in self.groups for rollout in group.rollouts]
        return float(np.mean([rollout.reward if part is None else rollout.parts[part] for rollout in all]))


def read(files: Iterable[Path], group_size: int, prompts: int) -> Rollouts:
    """Read the graded parquet files of a round.

    Parameters
    ----------
    files
        One per shard.
    group_size
        G: how many samples of each prompt were wanted.
    prompts
        How many prompts the round has. One that none of its completions was accepted for is in no file, and dropped.

    Raises
    ------
    UnusableRollouts
        When a sample is there twice, was drawn with other weights than the rest, or is damaged; when no group is left.
    """
    import pyarrow.parquet as pq

    groups: dict[int, list[Rollout]] = {}
    seen: set[str] = set()
    hashes: set[str] = set()
    left_out = 0
    for file in files:
        table = pq.read_table(file)
        arrays = {name: table[name].combine_chunks() for name in ("prompt_token_ids", "token_ids", "logprobs")}
        names = [name for name in table.column_names if name not in (*arrays, "yes_probabilities", "text")]
        for place, row in enumerate(table.select(names).to_pylist()):
            id = row["sample_id"]
            if id in seen:
                raise UnusableRollouts(f"sample {id} is there twice, the second time in {file}")
            seen.add(id)
            hashes.add(row["weights_hash"])
            members = groups.setdefault(row["group"], [])
            if row["left_out"]:
                left_out += 1
                continue
            values = {name: array[place].values.to_numpy(zero_copy_only=False) for name, array in arrays.items()}
            members.append(_rollout(row, values, file))
    if len(hashes) > 1:
        raise UnusableRollouts(f"the samples were drawn with different weights: {', '.join(sorted(hashes))}")
    used = [Group(tuple(sorted(g, key=lambda r: r.attempt))) for _, g in sorted(groups.items()) if len(g) >= 2]
    if not used:
        raise UnusableRollouts(f"{left_out} of {len(seen)} samples were left out: no group has two to compare")
    counts = Counts(
        samples=len(seen),
        left_out=left_out,
        groups=prompts,
        dropped_groups=prompts - len(used),
        short_groups=sum(len(group.rollouts) < group_size for group in used),
        equal_groups=sum(group.has_equal_rewards for group in used),
    )
    return Rollouts(tuple(used), counts, hashes.pop())


def _rollout(row: Mapping[str, Any], values: Mapping[str, NDArray[Any]], file: Path) -> Rollout:
    tokens, logprobs = values["token_ids"].astype(np.int32), values["logprobs"].astype(np.float32)
    problem = None
    if not len(tokens) or not len(values["prompt_token_ids"]):
        problem = "has no tokens"
    elif len(tokens) != len(logprobs):
        problem = f"has {len(tokens)} tokens and {len(logprobs)} log-probabilities"
    elif not np.isfinite(logprobs).all():
        problem = "has a log-probability that is no number"
    elif not np.isfinite(row["reward"]):
        problem = "has a reward that is no number"
    if problem:
        raise UnusableRollouts(f"sample {row['sample_id']} in {file} {problem}")
    return Rollout(
        id=row["sample_id"],
        row_id=row["row_id"],
        group=row["group"],
        attempt=row["attempt"],
        prompt_ids=values["prompt_token_ids"].astype(np.int32),
        token_ids=tokens,
        logprobs=logprobs,
        finished=row["finish_reason"] != "length",
        parts={part: float(row[f"reward_{part}"]) for part in PARTS},
        reward=float(row["reward"]),
    )


def batch_deviation(rewards: Sequence[float]) -> float:
    """Deviation of the rewards of one optimizer step, for `train.scale_rewards: batch`."""
    return float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
