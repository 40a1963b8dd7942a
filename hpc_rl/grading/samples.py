"""Samples and graded samples as rows of parquet files: what sampling hands to grading, and grading to training.

A file's rows are in one order, whatever the order in which they were drawn: the same samples make the same file. They
lie in row groups that are read one after the other, so a reader needs no more memory for a shard of thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, BinaryIO, TypeVar, get_args, get_type_hints

ROWS = 256
"""Samples in one row group."""


@dataclass(frozen=True)
class Sample:
    """One sampled completion.

    Attributes
    ----------
    sample_id
        Unique in the run: `r01-<row id>-g3`, or `r01-<row id>-<role>-g3` in a recipe with several roles.
    row_id
        The data set row that the prompt was made from.
    role
        Who says it: `speaker`.
    group
        Number of the prompt in the round. Roles that solve the same row share it.
    attempt
        Its number among the completions of its row and role, from 0 (V3).
    accepted
        Counts for the group (V2). The others are stored for their history (V7), and neither graded nor trained on.
    prompt_token_ids
        The prompt as the engine read it, image tokens written out.
    token_ids, logprobs
        Sampled tokens, and the log-probability of each in the distribution that was sampled from.
    text, finish_reason
        Their text without control tokens; `length` if they were cut off.
    seed, weights_hash
        What they were drawn with.
    """

    sample_id: str
    row_id: str
    role: str
    group: int
    attempt: int
    accepted: bool
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    seed: int
    weights_hash: str


@dataclass(frozen=True)
class GradedSample(Sample):
    """A sample and what it is worth; recipes add the parts of their reward, `reward_NAME`, and what it was graded by.

    Attributes
    ----------
    reward
        Weighted sum of the parts; None for a sample that is left out.
    left_out
        Nobody could say what it is worth: the sample is in no group.
    """

    reward: float | None
    left_out: bool


S = TypeVar("S", bound=Sample)


def load_writer() -> None:
    """Load what `write_samples` needs, before time counts: pyarrow's first array loads pandas where it is installed."""
    import pyarrow as pa
    import pyarrow.parquet

    pa.array([""])


def write_samples(to: Path | BinaryIO, samples: Sequence[S], kind: type[S]) -> None:
    """Write samples ordered by group, role and attempt.

    Parameters
    ----------
    to
        A parquet file, or one that is open for writing and stays open.
    samples
        In any order. There may be none: the file then has columns only.
    kind
        `Sample`, or a recipe's graded sample: which columns there are.

    Raises
    ------
    ValueError
        When an attempt is there twice.
    """
    import pyarrow as pa

    ordered = sorted(samples, key=_place)
    for one, other in pairwise(ordered):
        if _place(one) == _place(other):
            raise ValueError(f"attempt {one.attempt} at {one.row_id} as {one.role} is there twice: {one.sample_id}")
    columns = schema(kind)
    with open_writer(to, kind) as writer:
        for start in range(0, len(ordered), ROWS):
            rows = ordered[start : start + ROWS]
            arrays = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in columns]
            writer.write_table(pa.Table.from_arrays(arrays, schema=columns), row_group_size=ROWS)


def open_writer(to: Path | BinaryIO, kind: type[Sample]) -> Any:
    """A parquet writer for samples of a kind, to be closed: for tables in their order, `ROWS` in a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = schema(kind)
    # No dictionary of sampled tokens: they repeat too little, and it triples the time and adds a half to the size.
    repeated = [field.name for field in columns if field.type == pa.string()] + ["prompt_token_ids.list.element"]
    return pq.ParquetWriter(to, columns, use_dictionary=repeated, compression="zstd")


def iter_samples(path: Path, batch: int = 64) -> Iterator[Sample]:
    """The samples of a file in its order, graded or not; `batch` of them are in memory at once, and a row group."""
    return iter_graded(path, Sample, batch)


def iter_graded(path: Path, kind: type[S], batch: int = 64) -> Iterator[S]:
    """The samples of a recipe's kind, like `iter_samples`."""
    import pyarrow.parquet as pq

    names = [field.name for field in fields(kind)]
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(batch, columns=names):
            for row in rows.to_pylist():
                values: Any = {n: tuple(value) if isinstance(value, list) else value for n, value in row.items()}
                yield kind(**values)


def read_samples(path: Path) -> tuple[Sample, ...]:
    """All samples of a file, in its order."""
    return tuple(iter_samples(path))


def read_graded(path: Path, kind: type[S]) -> tuple[S, ...]:
    """All samples of a recipe's kind, in the file's order."""
    return tuple(iter_graded(path, kind))


def _place(sample: Sample) -> tuple[int, str, int]:
    return sample.group, sample.role, sample.attempt


def schema(kind: type[Sample]) -> Any:
    """The columns of a kind of sample: one per field, of the field's type."""
    import pyarrow as pa

    types = {
        str: pa.string(), bool: pa.bool_(), int: pa.int32(), float: pa.float32(),
        tuple[int, ...]: pa.list_(pa.int32()), tuple[float, ...]: pa.list_(pa.float32()),
    }  # fmt: skip
    hints = get_type_hints(kind)
    made = {field.name: types[_without_none(hints[field.name])] for field in fields(kind)}
    return pa.schema(list({**made, "seed": pa.int64()}.items()))


def _without_none(hint: Any) -> Any:
    """`float` of `float | None`."""
    rest = [part for part in get_args(hint) if part is not NoneType]
    return rest[0] if isinstance(hint, UnionType) and len(rest) == 1 else hint
