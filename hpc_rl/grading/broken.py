"""Questions whose reference answer was found wrong (S4): the file of them that grading leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

ROWS = 4096
"""Of a file in memory at once."""


@dataclass(frozen=True)
class Broken:
    """A question whose reference answer a teacher found wrong.

    Attributes
    ----------
    question_id
        Which.
    why
        The teacher's reason.
    suggested_answer
        What it says the answer is.
    """

    question_id: str
    why: str
    suggested_answer: str


NAMES = tuple(field.name for field in fields(Broken))


def write_broken(path: Path, broken: Sequence[Broken]) -> None:
    """Write a file of broken questions; also of none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array([getattr(one, name) for one in broken], pa.string()) for name in NAMES]
    pq.write_table(pa.Table.from_arrays(columns, names=list(NAMES)), path, compression="zstd")


def iter_broken(files: Iterable[Path]) -> Iterator[Broken]:
    """The broken questions of some files, in order."""
    import pyarrow.parquet as pq

    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS, columns=list(NAMES)):
                for row in batch.to_pylist():
                    yield Broken(**row)
