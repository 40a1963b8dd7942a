"""Grading many completions of the Lewis game at once: which questions to ask, and what the answers are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_rl.config.lewis import RewardsConfig
from hpc_rl.data.lewis import GameRow
from hpc_rl.grading.lewis import (
    UNDECIDED,
    Description,
    Reward,
    Weights,
    accuracy_reward,
    format_reward,
    length_reward,
    parse,
    question,
)
from hpc_rl.grading.samples import GradedSample
from hpc_rl.services.client import ListenerClient, ScoreError, ScoreRequest, ScoreResult


@dataclass(frozen=True)
class LewisGraded(GradedSample):
    """A description and what it is worth.

    Attributes
    ----------
    reward_accuracy, reward_format, reward_length
        Parts of the reward, unweighted. `reward_accuracy` is None for a sample that is left out.
    predicted_index
        The candidate that the listener picked, -1 for none.
    yes_probabilities
        P(yes) of each candidate; empty where nothing was asked, because the text describes nothing or it is left out.
    """

    reward_accuracy: float | None
    reward_format: float
    reward_length: float
    predicted_index: int
    yes_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What one completion is worth.

    Attributes
    ----------
    description
        What it says; None when it says nothing about the image, which is not worth a question.
    score
        The listener's; None where nothing was asked.
    reward
        Its parts; `accuracy` counts for nothing when it is left out.
    """

    description: Description | None
    score: ScoreResult | ScoreError | None
    reward: Reward

    @property
    def left_out(self) -> bool:
        """True when the listener gave no score (L11)."""
        return isinstance(self.score, ScoreError)

    @property
    def predicted_index(self) -> int:
        """The candidate that was picked, `UNDECIDED` for none."""
        return self.score.predicted_index if isinstance(self.score, ScoreResult) else UNDECIDED

    @property
    def yes_probabilities(self) -> tuple[float, ...]:
        """P(yes) of each candidate; empty where nothing was asked or answered."""
        return self.score.yes_probabilities if isinstance(self.score, ScoreResult) else ()


def judge(
    texts: Sequence[str], rows: Sequence[GameRow], listener: ListenerClient, template: str, rewards: RewardsConfig
) -> list[Verdict]:
    """Grade completions, each of the game in the row beside it.

    Parameters
    ----------
    texts, rows
        Completions and their games, equally many.
    listener
        Who is asked.
    template
        The listener's question (L3).
    rewards
        How accuracy is rewarded.

    Raises
    ------
    ServiceUnavailable
        When no listener answered until the deadline.
    """
    descriptions = [parse(text) for text in texts]
    asked = [
        ScoreRequest(question(template, said), row.ret_paths)
        for said, row in zip(descriptions, rows, strict=True)
        if said is not None
    ]
    scores = iter(listener.score(asked))
    verdicts = []
    for text, said, row in zip(texts, descriptions, rows, strict=True):
        score = next(scores) if said is not None else None
        accuracy = 0.0
        if isinstance(score, ScoreResult):
            accuracy = accuracy_reward(score.yes_probabilities, score.predicted_index, row.label, rewards.accuracy.mode)
        verdicts.append(Verdict(said, score, Reward(accuracy, format_reward(text), length_reward(text))))
    return verdicts


def weights_of(rewards: RewardsConfig) -> Weights:
    """The weights in a config."""
    return Weights(rewards.accuracy.weight, rewards.format.weight, rewards.length.weight)


def recognition(verdicts: Sequence[Verdict], rows: Sequence[GameRow]) -> Mapping[str, float]:
    """How often the listener's yes or no about a single candidate is right (L21).

    `recognition_yes`: P(yes) > ½ for the target; `recognition_no`: P(yes) ≤ ½ for another candidate;
    `recognition_overall`: the mean of both, so that always saying no is worth ½. Games without scores do not count.
    """
    yes = [v.yes_probabilities[row.label] > 0.5 for v, row in zip(verdicts, rows, strict=True) if v.yes_probabilities]
    no = [
        p <= 0.5
        for v, row in zip(verdicts, rows, strict=True)
        for place, p in enumerate(v.yes_probabilities)
        if place != row.label
    ]
    if not yes:
        return {}
    shares = sum(yes) / len(yes), sum(no) / len(no)
    return {"recognition_yes": shares[0], "recognition_no": shares[1], "recognition_overall": sum(shares) / 2}
