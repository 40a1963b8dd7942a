"""The questions of the next round (S9): all that failed, new ones, and some of the rest.

    asked again   failed: no attempt was right, or none could be graded; all of them, unless their reference answer is
                  broken (S4), or no attempt was made, because they are too long for the solver (`sample.long_prompts`)
                  replay: `replay_fraction` of the others, drawn by the seed
    new           variants that a teacher wrote in this round, unless one was a question of the run before, of any round
                  and whatever became of it, or is held out, or another new one is the same

So no question is there twice: of two that are the same the one that was asked before stays. Which ones stay is a pure
function of what the round gave; nothing depends on how its work was cut into shards, or on the order in which they are
read.
"""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_rl.grading.results import Zone
from hpc_rl.run.seeds import seeded_order

Fate = Literal["failed", "replay", "left", "broken", "unasked", "cut"]
"""What becomes of a question: it is asked again because it failed or was drawn; it is left behind; its reference answer
is broken; it could not be asked; or it would be asked again, but `max_questions` are there without it."""


@dataclass(frozen=True)
class Variant:
    """A new question: its id, whose variant it is, and `text_key` of its text."""

    question_id: str
    parent_id: str
    key: bytes


@dataclass(frozen=True)
class NextPool:
    """Who is in the next pool.

    Attributes
    ----------
    fates
        By place in the pool of the round.
    enhanced_to
        Id of a parent → id of its variant in the next pool.
    duplicates_dropped, held_out_dropped, variants_cut
        Variants that are not in it: the question was there before; it is held out; there was no room.
    """

    fates: Sequence[Fate]
    enhanced_to: Mapping[str, str]
    duplicates_dropped: int
    held_out_dropped: int
    variants_cut: int

    @property
    def counts(self) -> Counter[Fate]:
        """How many questions have which fate."""
        return Counter(self.fates)

    @property
    def questions(self) -> int:
        """The size of the next pool."""
        return self.counts["failed"] + self.counts["replay"] + len(self.enhanced_to)


def next_pool(
    ids: Sequence[str],
    zones: Sequence[Zone],
    broken: Collection[str],
    unasked: Collection[str],
    variants: Iterable[Variant],
    *,
    seen: Container[bytes],
    held_out: Container[bytes],
    replay_fraction: float,
    max_questions: int | None,
    seed: int,
    round: int,
) -> NextPool:
    """Decide what the next pool has.

    Parameters
    ----------
    ids, zones
        The questions of the round and how they were answered, by place.
    broken
        Ids of those whose reference answer was found wrong.
    unasked
        Ids of those at which no attempt was made.
    variants
        In any order; of each question one at most.
    seen, held_out
        Keys of all questions of the run so far, those of this round among them; of the held-out questions.
    replay_fraction
        `round(replay_fraction · n)` of the n other questions are drawn.
    max_questions
        Where there are more, replayed ones go first, then failed ones, then new ones: each time those that come last
        in an order of the seed.
    seed, round
        What is drawn depends on these and on the ids.
    """
    places = {id: place for place, id in enumerate(ids)}
    fates: list[Fate] = ["broken" if id in broken else "unasked" if id in unasked else "left" for id in ids]
    failed: list[str] = []
    others: list[str] = []
    for id, zone, fate in zip(ids, zones, fates, strict=True):
        if fate == "left":
            (failed if zone in ("too_hard", "ungraded") else others).append(id)
    number = builtins.round(replay_fraction * len(others))
    replay = seeded_order(others, seed, "replay", round)[:number] if number else []
    new: dict[bytes, Variant] = {}
    duplicates = leaks = 0
    for variant in sorted(variants, key=lambda variant: places[variant.parent_id]):
        if variant.key in held_out:
            leaks += 1
        elif variant.key in seen or variant.key in new:
            duplicates += 1
        else:
            new[variant.key] = variant
    enhanced_to = {variant.parent_id: variant.question_id for variant in new.values()}
    assert len(enhanced_to) == len(new), "a question has one variant at most"
    room = len(ids) + len(new) if max_questions is None else max_questions
    kept = _first(list(enhanced_to), room, seed, "cut enhanced", round)
    failed_kept = _first(failed, room - len(kept), seed, "cut failed", round)
    replay_kept = replay[: room - len(kept) - len(failed_kept)]
    for fate, group in (("cut", failed), ("cut", replay), ("failed", failed_kept), ("replay", replay_kept)):
        for id in group:
            fates[places[id]] = fate  # type: ignore[assignment]  # mypy widens the tuples' first items to str
    return NextPool(
        fates=fates,
        enhanced_to={parent: enhanced_to[parent] for parent in sorted(kept, key=places.__getitem__)},
        duplicates_dropped=duplicates,
        held_out_dropped=leaks,
        variants_cut=len(new) - len(kept),
    )


def _first(ids: list[str], number: int, seed: int, what: str, round: int) -> list[str]:
    return ids if len(ids) <= number else seeded_order(ids, seed, what, round)[:number]
