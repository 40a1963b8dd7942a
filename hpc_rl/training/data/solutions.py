"""Questions with solutions that are right or wrong: what reward models and verifiers learn from.

A parquet file of solutions has the columns

    question_id             string; the rows of a question may be in several files
    solution_id             string, unique in the round
    label                   1 right, 0 wrong, -1 unknown: left out and counted
    score                   number, where somebody has scored the solutions
    token_ids               the question and the solution as the model reads them; or in its place
    question, solution      strings, shown through the chat template as the reward-model service does
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hpc_rl.training.data import columns, encoding
from hpc_rl.training.data.columns import INTEGER, NUMBER, STRING, TOKENS, Rows
from hpc_rl.training.data.limits import Limits, TooLong
from hpc_rl.training.data.rows import Chunks, Writer, Written, once, open_index, room
from hpc_rl.training.data.units import INDEX, Units, alone, id_hashes
from hpc_rl.training.errors import NothingToLearn

log = logging.getLogger(__name__)

ID, QUESTION = "solution_id", "question_id"
SCHEMA = pa.schema([(ID, STRING), (QUESTION, STRING), ("token_ids", TOKENS)])
MORE = [("question", np.uint64), ("label", np.int8), ("score", np.float32)]


@dataclass(frozen=True, eq=False)
class Solution:
    """A solution behind its question.

    Attributes
    ----------
    id
        Its name.
    token_ids
        (T,) int32: question and solution.
    label
        1 right, 0 wrong.
    score
        What it was scored with; NaN: nobody did.
    """

    id: str
    token_ids: NDArray[np.int32]
    label: int
    score: float


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its solutions."""

    id: str
    solutions: tuple[Solution, ...]


def read(
    files: Iterable[Path], tokenizer: Any, *, both: bool = True, system_prompt: str | None = None,
    max_length: int | None = None, too_long: TooLong = "error", vocabulary: int | None = None,
    pad_id: int | None = None, rank: int = 0,
) -> Units[Question]:  # fmt: skip
    """The questions of a round, in the order in which the files name them. All ranks must call it.

    Parameters
    ----------
    files
        One per shard. The first rank of each node reads them.
    tokenizer
        For texts that are no token ids yet.
    both
        Leave out and count questions that do not have both a right and a wrong solution.
    system_prompt
        Before questions that are texts, as in the service's config.
    max_length, too_long
        Most tokens of a question with one solution, and what becomes of a solution that has more.
    vocabulary
        Tokens of the model; None: not checked.
    pad_id
        A token that no solution may end in: where transformers' models take the score one token early.

    Raises
    ------
    UnusableData
        When a solution is damaged, or is there twice; NothingToLearn when no question is left.
    OSError
        When the disk is full.
    """
    limits = Limits(max_length, too_long, vocabulary)

    def write(folder: Path) -> Written:
        encoder = encoding.Encoder(tokenizer)
        with room(folder, "solutions"), _Writer(folder, limits, pad_id) as writer:
            for file in files:
                for rows, tokens in _tokens(file, encoder, system_prompt):
                    writer.take(rows, tokens)
            return writer.finish(both)

    units = once(rank, write, _open)
    log.info("questions: %s", units.numbers())
    return units


def _tokens(file: Path, encoder: encoding.Encoder, system_prompt: str | None) -> Iterator[tuple[Rows, pa.Array]]:
    more = {QUESTION: STRING, "label": INTEGER, **({"score": NUMBER} if "score" in columns.types_of(file) else {})}
    if columns.choose(file, ["token_ids"], ["question", "solution"]) == 0:
        for rows in columns.read(file, ID, {"token_ids": TOKENS, **more}):
            yield rows, rows["token_ids"]
        return
    for rows in columns.read(file, ID, {"question": STRING, "solution": STRING, **more}):
        yield rows, pa.array(encoder.solutions(rows, "question", "solution", system_prompt), TOKENS)


class _Writer(Writer):
    """Writes solutions, and finds those that belong together."""

    def __init__(self, folder: Path, limits: Limits, pad_id: int | None) -> None:
        super().__init__(folder, ID, SCHEMA, MORE)
        self._limits, self._pad_id = limits, pad_id
        self._left_out = Counter(too_long=0, unknown_label=0)

    def take(self, rows: Rows, tokens: pa.Array) -> None:
        """Write those that can be learned from."""
        labels, lengths = rows.numbers("label"), pc.list_value_length(tokens).to_numpy()
        rows.refuse_first(~np.isin(labels, (-1, 0, 1)), "label", "it is none of 1 (right), 0 (wrong), -1 (unknown)")
        self._limits.check(rows, {"token_ids": tokens})
        last = tokens.flatten().to_numpy()[np.cumsum(lengths) - 1]
        rows.refuse_first(
            last == self._pad_id, "token_ids", f"it ends in the padding token {self._pad_id}, so the model would give "
            "its score one token early: give the tokenizer a pad_token of its own"
        )  # fmt: skip
        known, short = labels >= 0, self._limits.keep(rows, "token_ids", lengths)
        self._left_out.update(unknown_label=int((~known).sum()), too_long=int((known & ~short).sum()))
        keep = known & short
        made = {ID: rows[ID], QUESTION: rows[QUESTION], "token_ids": tokens}
        index = self.add(rows.file, rows.ids, keep, pa.RecordBatch.from_pydict(made).filter(pa.array(keep)))
        index["length"], index["label"] = lengths[keep], labels[keep]
        index["question"] = id_hashes(rows[QUESTION].to_pylist())[keep]
        index["score"] = rows.numbers("score")[keep] if "score" in rows.batch.schema.names else np.nan

    def finish(self, both: bool) -> Written:
        """The index, question after question, in the order in which they came first."""
        index = self.index()
        _, first, question = np.unique(index["question"], return_index=True, return_inverse=True)
        index = index[np.argsort(first[question], kind="stable")]
        starts = _starts(index)
        sizes = np.diff(starts)
        right = np.add.reduceat(index["label"], starts[:-1], dtype=np.int64) if len(index) else sizes
        one_sided = (right == 0) | (right == sizes)
        if both:
            index = index[np.repeat(~one_sided, sizes)]
            self._left_out["one_sided_questions"] = int(one_sided.sum())
        if not len(index):
            why = ", ".join(f"{number} {reason}" for reason, number in self._left_out.items())
            raise NothingToLearn(f"no question is left: {self.read} solutions were read, left out were {why}")
        return self.save(index, {"solutions": len(index), **self._left_out})


def _starts(index: NDArray[Any]) -> NDArray[np.int64]:
    """(Q + 1,) where each question's solutions start in an ordered index, and its length."""
    changes = np.flatnonzero(index["question"][1:] != index["question"][:-1]) + 1
    return np.concatenate(([0], changes, [len(index)])) if len(index) else np.zeros(1, np.int64)


def _open(written: Written) -> Units[Question]:
    each, chunks = open_index(written.folder), Chunks(written.folder)
    starts = _starts(each)
    index = np.zeros(len(starts) - 1, np.dtype([*INDEX, ("first", np.int64), ("solutions", np.int32)]))
    index["first"], index["solutions"] = starts[:-1], np.diff(starts)
    index["id_hash"] = each["question"][starts[:-1]]
    index["length"] = np.add.reduceat(each["length"], starts[:-1])

    def reader(places: NDArray[Any]) -> list[Question]:
        return [_question(each[int(at["first"]) : int(at["first"] + at["solutions"])], chunks) for at in places]

    return Units(index, alone(len(index)), reader, written.digest, left_out=written.left_out)


def _question(each: NDArray[Any], chunks: Chunks) -> Question:
    rows = [(chunks(place), place) for place in each]
    (name,) = {row[QUESTION] for row, _ in rows}
    return Question(
        name,
        tuple(
            Solution(row[ID], row.array("token_ids"), int(place["label"]), float(place["score"])) for row, place in rows
        ),
    )
