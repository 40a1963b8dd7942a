"""What came of a round's questions: how many attempts were right, and in which zone each question is (S4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from hpc_rl.data.row_writer import RowWriter

Zone = Literal["mastered", "learning", "too_hard", "ungraded"]
ZONES: tuple[Zone, ...] = ("mastered", "learning", "too_hard", "ungraded")
ROWS = 4096
"""Results in one row group."""


@dataclass(frozen=True)
class Result:
    """One question of a round's pool.

    Attributes
    ----------
    question_id, place
        The question, and its place in the pool, from 0.
    attempts
        Those that were made and count; right + wrong + left_out.
    right, wrong, left_out
        How many of them are, and how many nobody could judge.
    success_rate
        right / (right + wrong); None where nothing was judged.
    zone
        `mastered` all right, `learning` some, `too_hard` none, `ungraded` where nothing was judged.
    """

    question_id: str
    place: int
    attempts: int
    right: int
    wrong: int
    left_out: int
    success_rate: float | None
    zone: Zone


def result(question_id: str, place: int, right: int, wrong: int, left_out: int) -> Result:
    """The result of a question from the numbers of its attempts."""
    judged = right + wrong
    rate = right / judged if judged else None
    return Result(question_id, place, judged + left_out, right, wrong, left_out, rate, zone_of(right, wrong))


def zone_of(right: int, wrong: int) -> Zone:
    """The zone of a question with so many right and wrong attempts."""
    if right:
        return "learning" if wrong else "mastered"
    return "too_hard" if wrong else "ungraded"


def schema() -> Any:
    """Of a parquet file of results."""
    import pyarrow as pa

    types = {"question_id": pa.string(), "success_rate": pa.float64(), "zone": pa.string()}
    return pa.schema([(field.name, types.get(field.name, pa.int32())) for field in fields(Result)])


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write results in order, a row group in memory at a time."""
    with RowWriter(path, schema(), ROWS) as writer:
        for one in results:
            writer.add(one)


def iter_results(path: Path) -> Iterator[Result]:
    """The results of a file in order."""
    import pyarrow.parquet as pq

    names = [field.name for field in fields(Result)]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=names):
            for row in batch.to_pylist():
                yield Result(**row)
