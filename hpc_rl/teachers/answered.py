"""A round's questions with what came of their attempts: what is read of graded files to make new questions of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from hpc_rl.data.questions import Question, iter_questions
from hpc_rl.grading.results import Zone, iter_results

ATTEMPTS = 256
"""Rows of a graded file in memory at once."""
LEAST_AGREEMENT = 2
"""Attempts with the same answer that make it a frequent one."""


@dataclass(frozen=True)
class Answered:
    """A question and its attempts.

    Attributes
    ----------
    question
        As the pool has it.
    zone
        What came of it (S4).
    wrong
        Texts of its first wrong attempts, none twice.
    frequent
        What most attempts have answered; None where no two agree.
    """

    question: Question
    zone: Zone
    wrong: tuple[str, ...]
    frequent: str | None


def iter_answered(questions: Path, places: range, graded: Path, results: Path, wrong: int) -> Iterator[Answered]:
    """The questions of a shard in order, a few in memory at once.

    Parameters
    ----------
    questions, places
        The round's pool, and the shard's part of it.
    graded, results
        What grading has made of the shard (`jobs.prosetting.grade`).
    wrong
        Most wrong attempts of a question; with 0 no text is read.

    Raises
    ------
    ValueError
        When the results are those of other questions.
    """
    attempts = _attempts(graded, texts=wrong > 0)
    place, rows = next(attempts, (None, []))
    for question, number, result in zip(iter_questions(questions, places), places, iter_results(results), strict=True):
        if (result.place, result.question_id) != (number, question.question_id):
            found = f"{result.question_id} at place {result.place}"
            raise ValueError(f"{results}: expected {question.question_id} at place {number}, found {found}")
        own = rows if place == number else []
        yield Answered(question, result.zone, _wrong(own, wrong), _frequent(own))
        if place == number:
            place, rows = next(attempts, (None, []))


def _attempts(path: Path, texts: bool) -> Iterator[tuple[int | None, list[dict[str, Any]]]]:
    """The attempts at each place of the pool that has any, in order."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = ["group", "answer", "reward_correctness", *(("text",) if texts else ())]
        batches = file.iter_batches(ATTEMPTS, columns=names)
        rows = (row for batch in batches for row in batch.to_pylist())
        for place, own in groupby(rows, itemgetter("group")):
            yield place, list(own)


def _wrong(rows: list[dict[str, Any]], most: int) -> tuple[str, ...]:
    if not most:
        return ()
    texts = (row["text"] for row in rows if row["reward_correctness"] == 0)  # null: nobody knows
    return tuple(dict.fromkeys(texts))[:most]


def _frequent(rows: list[dict[str, Any]]) -> str | None:
    answers = Counter(row["answer"] for row in rows if row["answer"])
    answer, number = next(iter(answers.most_common(1)), (None, 0))
    return answer if number >= LEAST_AGREEMENT else None
