"""Pairs for DPO from graded attempts (S5, S7): right × wrong of each question, each pair once in a run.

A pair is a prompt, an answer that was graded right and one that was graded wrong. What is trained on are the tokens
that the solver sampled; texts stand beside them for people, and say which answers are the same: those that differ in
white space at their ends alone are. Attempts that were cut off are wrong (`grading.answers`), so they may be the
rejected one; they have no end, and none is added. What was left out, since nobody could judge it, is in no pair.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_rl.data.questions import Question
from hpc_rl.run.seeds import derive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COUNTS = ("pairs_new", "questions_with_pairs", "duplicates", "too_many")

Message = Mapping[str, str]
Solve = Callable[[Question, Sequence[Message]], "Solution | None"]


@dataclass(frozen=True)
class Solution:
    """A reference solution, and its tokens as the chat template shows them behind the prompt."""

    text: str
    token_ids: Sequence[int]


class Pair(NamedTuple):
    """One row of train.parquet or validation.parquet, less its tokens.

    Attributes
    ----------
    pair_id
        Unique in the run: `r03-q000017-2`.
    question_id, root_id, round
        The question, the one of the file that it comes from, and the round in which it was attempted.
    prompt
        The chat that the solver answers.
    chosen, rejected
        Answers: attempts, by their places among the right and the wrong ones; `chosen` may be a `Solution`.
    """

    pair_id: str
    question_id: str
    root_id: str
    round: int
    prompt: Sequence[Message]
    chosen: int | Solution
    rejected: int


def schema() -> Any:
    """Of a parquet file of pairs, as `hpc_rl.training.data.pairs` reads it.

    Tokens are what is trained on. `chosen_from` is `attempt`, or `reference` for the question's own solution.
    """
    import pyarrow as pa

    chat, tokens = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), pa.list_(pa.int32())
    return pa.schema([
        ("pair_id", pa.string()), ("question_id", pa.string()), ("root_id", pa.string()), ("round", pa.int32()),
        ("prompt", chat), ("chosen", pa.string()), ("rejected", pa.string()), ("chosen_from", pa.string()),
        ("prompt_token_ids", tokens), ("chosen_token_ids", tokens), ("rejected_token_ids", tokens),
    ])  # fmt: skip


@dataclass(frozen=True)
class Attempts:
    """What a question was answered with in a round, by whether it is right; equal texts may be there several times."""

    right: Sequence[str]
    wrong: Sequence[str]

    @property
    def success_rate(self) -> float | None:
        """Share of right ones; None for none at all."""
        return len(self.right) / number if (number := len(self.right) + len(self.wrong)) else None


class Known:
    """Pairs that there are already, by eight bytes of what they say: of two in a million pairs one may be missed."""

    def __init__(self) -> None:
        self._added: list[NDArray[np.uint64]] = []
        self._keys: NDArray[np.uint64] | None = None

    def add(self, keys: Sequence[int]) -> None:
        """Add pairs by their `key_of`; all of them before the first is looked up."""
        import numpy as np

        assert self._keys is None, "complete before it is used"
        self._added.append(np.array(keys, np.uint64))

    def __bool__(self) -> bool:
        return bool(self._added) or (self._keys is not None and len(self._keys) > 0)

    def __contains__(self, key: int) -> bool:
        import numpy as np

        if self._keys is None:
            self._keys = np.sort(np.concatenate([np.empty(0, np.uint64), *self._added]))
            self._added = []
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        return place < len(self._keys) and int(self._keys[place]) == key


def key_of(prompt: Sequence[Message], chosen: str, rejected: str) -> int:
    """Equal for pairs that say the same, but for white space around the answers."""
    said = "\x1f".join([*(message["content"] for message in prompt), chosen.strip(), rejected.strip()])
    return int.from_bytes(hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class Pairing:
    """Makes the pairs of a round, question by question.

    Parameters
    ----------
    round, run_seed
        With the question they decide which pairs are taken where there are too many.
    most
        Pairs of one question in a round (`pairs.max_per_question`).
    known
        Pairs of earlier rounds.
    solve
        The reference solution of a question, where it may be chosen.

    Attributes
    ----------
    counts
        pairs_new, questions_with_pairs; and what came to nothing: duplicates (of right × wrong), too_many (cut by the
        cap).
    """

    def __init__(self, round: int, run_seed: int, most: int, known: Known, solve: Solve) -> None:
        self._round, self._seed, self._most, self._known, self._solve = round, run_seed, most, known, solve
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def pairs(self, question: Question, prompt: Sequence[Message], attempts: Attempts) -> list[Pair]:
        """The pairs of a question.

        Parameters
        ----------
        question
            It is there once in a round's pool.
        prompt
            How the solver is asked.
        attempts
            At it, in this round.
        """
        wrongs: Mapping[str, int] = _different(attempts.wrong)
        rights: Mapping[str, int | Solution] = _different(attempts.right)
        if not attempts.right and wrongs:
            solution = self._solve(question, prompt)
            rights = {} if solution is None else {solution.text.strip(): solution}
        candidates = [
            (one, other)
            for key, one in rights.items()
            for other_key, other in wrongs.items()
            if other_key not in rights and not (self._known and key_of(prompt, key, other_key) in self._known)
        ]
        self.counts["duplicates"] += (len(attempts.right) or len(rights)) * len(attempts.wrong) - len(candidates)
        if len(candidates) > self._most:
            draw = random.Random(derive(self._seed, self._round, "pairs", question.question_id))
            self.counts["too_many"] += len(candidates) - self._most
            candidates = [candidates[at] for at in sorted(draw.sample(range(len(candidates)), self._most))]
        self.counts["pairs_new"] += len(candidates)
        self.counts["questions_with_pairs"] += bool(candidates)
        id, root = question.question_id, question.root_id
        return [
            Pair(f"r{self._round:02d}-{id}-{number}", id, root, self._round, prompt, one, other)
            for number, (one, other) in enumerate(candidates)
        ]


def _different(texts: Sequence[str]) -> dict[str, int]:
    """The place of each text that says something, once."""
    found: dict[str, int] = {}
    for place, text in enumerate(texts):
        found.setdefault(text.strip(), place)
    found.pop("", None)
    return found
