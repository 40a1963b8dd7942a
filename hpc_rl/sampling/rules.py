"""When a task has had enough attempts, and which of them count (V2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

EQUAL_WITHIN = 1e-8
"""Scores that are no further apart are equal: the advantage of such a group is 0 (L15)."""


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt.

    Attributes
    ----------
    accepted
        It is what its role is asked for: correct for helpful, wrong for sneaky, well-formed.
    score
        What it is worth, where the rule compares attempts.
    """

    accepted: bool
    score: float | None = None


class Rule(Protocol):
    """How many attempts a task gets. An answer depends on nothing but the outcomes, by number of the attempt.

    Which attempts are drawn in the end must not depend on the order in which they finish: a sample that is drawn again
    after a kill must be the same one. So `wanted` may not draw more, or less, because something was known earlier.
    """

    def wanted(self, outcomes: Sequence[Outcome | None]) -> int:
        """How many more attempts to draw now; None stands for one that is still being drawn."""

    def verdict(self, outcomes: Sequence[Outcome]) -> Literal["enough", "exhausted"]:
        """Whether a task that wants no more has what it should have."""

    def kept(self, outcomes: Sequence[Outcome]) -> tuple[int, ...]:
        """Numbers of the attempts that count."""


@dataclass(frozen=True)
class KAccepted:
    """Draw until k attempts are accepted, `max_tries` at most: rejection sampling, as in V2.

    As many are drawn at once as are missing, and one more for each that is refused, so that at the end k are accepted
    and the last one drawn was needed.
    """

    k: int
    max_tries: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.max_tries:
            raise ValueError(f"k is {self.k} and max_tries is {self.max_tries}: expected 1 <= k <= max_tries")

    def wanted(self, outcomes: Sequence[Outcome | None]) -> int:
        """See `Rule.wanted`."""
        hoped_for = sum(outcome is None or outcome.accepted for outcome in outcomes)
        return max(0, min(self.k - hoped_for, self.max_tries - len(outcomes)))

    def verdict(self, outcomes: Sequence[Outcome]) -> Literal["enough", "exhausted"]:
        """See `Rule.verdict`."""
        return "enough" if len(self.kept(outcomes)) >= self.k else "exhausted"

    def kept(self, outcomes: Sequence[Outcome]) -> tuple[int, ...]:
        """The accepted ones: fewer than k of a task that is exhausted."""
        return tuple(number for number, outcome in enumerate(outcomes) if outcome.accepted)


@dataclass(frozen=True)
class VariedGroup:
    """Draw groups of `size` attempts until one holds different scores, `max_groups` at most.

    The dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), which leaves out groups that carry no gradient. DAPO
    takes other prompts in their place until its batch is full; here the same prompt is drawn again, so that what is
    drawn for one prompt does not depend on others, which may lie in the shards of other tasks.

    Only accepted attempts are compared and count. A group is drawn again as a whole: attempts of different groups in
    one would make equal scores look like different ones.
    """

    size: int
    max_groups: int

    def __post_init__(self) -> None:
        if self.size < 2 or self.max_groups < 1:
            raise ValueError(
                f"size is {self.size} and max_groups is {self.max_groups}: expected size >= 2 and max_groups >= 1"
            )

    def wanted(self, outcomes: Sequence[Outcome | None]) -> int:
        """See `Rule.wanted`."""
        known = [outcome for outcome in outcomes if outcome is not None]
        if len(known) < len(outcomes) or len(known) == self.size * self.max_groups:
            return 0
        return 0 if self.kept(known) else self.size

    def verdict(self, outcomes: Sequence[Outcome]) -> Literal["enough", "exhausted"]:
        """See `Rule.verdict`."""
        return "enough" if self.kept(outcomes) else "exhausted"

    def kept(self, outcomes: Sequence[Outcome]) -> tuple[int, ...]:
        """The accepted ones of the last group where their scores differ; otherwise none.

        Raises
        ------
        ValueError
            When an accepted attempt has no score.
        """
        first = max(0, len(outcomes) - self.size)
        kept = tuple(number for number in range(first, len(outcomes)) if outcomes[number].accepted)
        scores = [score for number in kept if (score := outcomes[number].score) is not None]
        if len(scores) < len(kept):
            raise ValueError("VariedGroup compares scores, but an accepted attempt has none (Outcome.score)")
        return kept if scores and max(scores) - min(scores) > EQUAL_WITHIN else ()
