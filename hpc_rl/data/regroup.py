"""Record batches of any size become a parquet file with row groups of one size.

The file depends on the rows alone, not on the pieces in which they came, and does not get more and smaller row groups
each time that a part of it is copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_batches(path: Path, schema: Any, batches: Iterable[Any], rows: int) -> int:
    """Write record batches of this schema in row groups of `rows` rows; how many rows there were.

    In memory are a row group and a batch.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[Any] = []
    number = written = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            waiting.append(batch)
            number += batch.num_rows
            while number - written >= rows:
                table = pa.Table.from_batches(waiting, schema)
                writer.write_table(table[:rows].combine_chunks())
                waiting = table[rows:].to_batches()
                written += rows
        if number > written:
            writer.write_table(pa.Table.from_batches(waiting, schema).combine_chunks())
    return number
