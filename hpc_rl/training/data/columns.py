"""Reading a parquet file strictly: the columns wanted, of their types, without holes. What is wrong is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hpc_rl.training.errors import UnusableData

READ_AT_ONCE = 1024
"""Rows of a parquet file in memory while it is read."""

STRING, INTEGER, NUMBER, TOKENS = pa.string(), pa.int64(), pa.float64(), pa.list_(pa.int32())
CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
EXPECTED = {
    STRING: "a string", INTEGER: "an integer", NUMBER: "a number", TOKENS: "a list of token ids",
    CHAT: "a list of messages, each a struct of the strings role and content",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a file.

    Attributes
    ----------
    file, first
        Where they are: the number of the first row in its file.
    id
        Name of the column that names rows.
    batch
        Their columns, cast to the types that were asked for.
    """

    file: Path
    first: int
    id: str
    batch: pa.RecordBatch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, column: str) -> Any:
        return self.batch[column]

    @property
    def ids(self) -> list[str]:
        """What the rows are called."""
        found: list[str] = self.batch[self.id].to_pylist()
        return found

    def numbers(self, column: str) -> NDArray[Any]:
        """(rows,) of a column of numbers."""
        found: NDArray[Any] = self.batch[column].to_numpy(zero_copy_only=False)
        return found

    def lengths(self, column: str) -> NDArray[np.int32]:
        """(rows,) how long the lists of a column are."""
        found: NDArray[np.int32] = pc.list_value_length(self.batch[column]).to_numpy(zero_copy_only=False)
        return found

    def complaint(self, row: int, column: str, what: str) -> UnusableData:
        """What is wrong with one value."""
        id = self.batch[self.id][row].as_py()
        return UnusableData(f"{self.file}, row {self.first + row}, {self.id} {id}, column {column}: {what}")

    def refuse(self, row: int, column: str, what: str) -> NoReturn:
        """Raise UnusableData for one value."""
        raise self.complaint(row, column, what)

    def refuse_first(self, wrong: Any, column: str, what: str) -> None:
        """Raise UnusableData for the first of the rows that are wrong, if any is."""
        wrong = np.asarray(wrong)
        if wrong.any():
            self.refuse(int(np.argmax(wrong)), column, what)


def types_of(file: Path) -> Mapping[str, pa.DataType]:
    """Columns of a parquet file and their types.

    Raises
    ------
    UnusableData
        When it is none.
    """
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise UnusableData(f"{file} is not a parquet file: {error}") from error
    return {field.name: field.type for field in schema}


def choose(file: Path, *ways: Sequence[str]) -> int:
    """Which of several sets of columns a file has; the first one of those that are complete.

    Raises
    ------
    UnusableData
        When none is.
    """
    names = types_of(file)
    for number, way in enumerate(ways):
        if all(name in names for name in way):
            return number
    raise UnusableData(
        f"{file} has the columns {', '.join(names)}; needed are {' or '.join(' and '.join(way) for way in ways)}"
    )


def read(file: Path, id: str, columns: Mapping[str, pa.DataType]) -> Iterator[Rows]:
    """Rows of a file, some at a time.

    Parameters
    ----------
    id
        The column that names rows, a string.
    columns
        The other columns that are read, and their types: `STRING`, `INTEGER`, `NUMBER`, `TOKENS`, `CHAT`. Lists may not
        be empty.

    Raises
    ------
    UnusableData
        When a column is missing or of another type; when a value is missing, empty or out of range. The message names
        file, row and column.
    """
    wanted = {id: STRING, **columns}
    choose(file, list(wanted))
    first = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(READ_AT_ONCE, columns=list(wanted), use_threads=False):
            found = {name: _cast(batch[name], kind, f"column {name}", file, first) for name, kind in wanted.items()}
            rows = Rows(file, first, id, pa.RecordBatch.from_pydict(found))
            for name, kind in wanted.items():
                _check(rows, name, kind)
            yield rows
            first += len(batch)


def _cast(column: Any, kind: pa.DataType, what: str, file: Path, first: int) -> Any:
    if not _fits(column.type, kind):
        raise UnusableData(f"{file}, {what} is {column.type}; expected is {EXPECTED[kind]}")
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        if len(column) > 1:  # which row is it?
            for row in range(len(column)):
                _cast(column.take(pa.array([row])), kind, what, file, first + row)
        raise UnusableData(f"{file}, row {first}, {what}: expected is {EXPECTED[kind]}, but {error}") from error


def _fits(found: pa.DataType, kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(found):
        found = found.value_type
    if kind == STRING:
        return bool(types.is_string(found) or types.is_large_string(found))
    if kind == INTEGER:
        return bool(types.is_integer(found))
    if kind == NUMBER:
        return bool(types.is_integer(found) or types.is_floating(found))
    if not (types.is_list(found) or types.is_large_list(found)):
        return False
    inner = found.value_type
    if kind == TOKENS:
        return bool(types.is_integer(inner))
    names = {"role", "content"}
    return bool(
        types.is_struct(inner)
        and {field.name for field in inner} == names
        and all(_fits(inner.field(name).type, STRING) for name in names)
    )


def _check(rows: Rows, name: str, kind: pa.DataType) -> None:
    column = rows[name]
    rows.refuse_first(column.is_null(), name, f"there is nothing; expected is {EXPECTED[kind]}")
    if kind == NUMBER:
        rows.refuse_first(~np.isfinite(rows.numbers(name)), name, "it is no finite number")
    if kind not in (TOKENS, CHAT):
        return
    rows.refuse_first(rows.lengths(name) == 0, name, f"it is empty; expected is {EXPECTED[kind]}")
    inner = column.flatten()
    for part in [inner] if kind == TOKENS else inner.flatten():
        holes = owners(column)[np.asarray(part.is_null())]
        if len(holes):
            rows.refuse(int(holes[0]), name, f"a part of it is missing; expected is {EXPECTED[kind]}")
    if kind == TOKENS:
        negative = owners(column)[inner.to_numpy() < 0]
        if len(negative):
            rows.refuse(int(negative[0]), name, "it holds a negative token id")


def owners(column: pa.Array) -> NDArray[np.int64]:
    """(values,) for all values of a column of lists, one list after the other: the row that each belongs to."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    found: NDArray[np.int64] = np.repeat(np.arange(len(column)), lengths)
    return found
