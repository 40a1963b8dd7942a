"""Writing rows of a dataclass to a parquet file, a row group in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROWS = 2048
"""Most rows in one row group."""
GROUP_BYTES = 32 * 2**20
"""Of rows that Arrow has, where they are long."""


class RowWriter:
    """A context manager; the file has its columns also when nothing is added.

    Parameters
    ----------
    path, schema
        The file, and its columns: fields of what is added.
    rows
        Most in one row group.
    """

    def __init__(self, path: Path, schema: Any, rows: int = ROWS) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema, self._most = schema, rows
        # no dictionary of token ids: they repeat too little, and it takes three times as long and more room
        repeated = [name for name, kind in _leaves(schema) if not pa.types.is_integer(kind)]
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeated)
        self._waiting: list[Any] = []
        self.rows = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: Any) -> None:
        """Add a row: something with an attribute for each column."""
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) >= self._most:
            self._flush()

    def add_table(self, table: Any) -> None:
        """Add rows that Arrow has."""
        self._flush()
        fitting = GROUP_BYTES * table.num_rows // max(1, table.nbytes)
        rows = max(1, min(self._most, fitting))
        self._writer.write_table(table.select(self._schema.names).cast(self._schema), row_group_size=rows)
        self.rows += table.num_rows

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            columns = [pa.array([getattr(row, one.name) for row in self._waiting], one.type) for one in self._schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._waiting = []


def _leaves(fields: Iterable[Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The columns of a parquet file, by the names that parquet has for parts of lists and structs, and their types."""
    import pyarrow as pa

    for field in fields:
        name, kind = f"{above}{field.name}", field.type
        while pa.types.is_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        if pa.types.is_struct(kind):
            yield from _leaves(kind, f"{name}.")
        else:
            yield name, kind
