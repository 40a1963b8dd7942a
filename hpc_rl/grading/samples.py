"""Samples and graded samples as rows of parquet files: what sampling hands to grading, and grading to training.

A file's rows are in one order, whatever the order in which they were drawn: the same samples make the same file. They
lie in row groups that are read one after the other, so a reader needs no more memory for a shard of thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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
    """A sample and what it is worth.

    Attributes
    ----------
    reward_accuracy, reward_format, reward_length
        Parts of the reward, unweighted. `reward_accuracy` and `reward` are None for a sample that is left out.
    reward
        Their weighted sum.
    left_out
        The service gave no score: the sample is in no group.
    predicted_index
        The candidate that the listener picked, -1 for none.
    yes_probabilities
        P(yes) of each candidate; empty where nothing was asked, because the text describes nothing or it is left out.
    """

    reward_accuracy: float | None
    reward_format: float
    reward_length: float
    reward: float | None
    left_out: bool
    predicted_index: int
    yes_probabilities: tuple[float, ...]


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
        `Sample` or `GradedSample`: which columns there are.

    Raises
    ------
    ValueError
        When an attempt is there twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(samples, key=_place)
    for one, other in pairwise(ordered):
        if _place(one) == _place(other):
            raise ValueError(f"attempt {one.attempt} at {one.row_id} as {one.role} is there twice: {one.sample_id}")
    schema = _schema(kind)
    # No dictionary of sampled tokens: they repeat too little, and it triples the time and adds a half to the size.
    repeated = [field.name for field in schema if field.type == pa.string()] + ["prompt_token_ids.list.element"]
    with pq.ParquetWriter(to, schema, use_dictionary=repeated, compression="zstd") as writer:
        for start in range(0, len(ordered), ROWS):
            rows = ordered[start : start + ROWS]
            columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROWS)


def iter_samples(path: Path, batch: int = 64) -> Iterator[Sample]:
    """The samples that `write_samples` wrote, in its order; `batch` of them are in memory at once, and a row group."""
    return (Sample(**row) for row in _rows(path, batch))


def iter_graded(path: Path, batch: int = 64) -> Iterator[GradedSample]:
    """The graded samples that `write_samples` wrote, like `iter_samples`."""
    return (GradedSample(**row) for row in _rows(path, batch))


def read_samples(path: Path) -> tuple[Sample, ...]:
    """All samples that `write_samples` wrote, in its order."""
    return tuple(iter_samples(path))


def read_graded(path: Path) -> tuple[GradedSample, ...]:
    """All graded samples that `write_samples` wrote, in its order."""
    return tuple(iter_graded(path))


def _place(sample: Sample) -> tuple[int, str, int]:
    return sample.group, sample.role, sample.attempt


def _schema(kind: type[Sample]) -> Any:
    import pyarrow as pa

    types = {
        "group": pa.int32(), "attempt": pa.int32(), "accepted": pa.bool_(), "prompt_token_ids": pa.list_(pa.int32()),
        "token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "seed": pa.int64(),
        "reward_accuracy": pa.float32(), "reward_format": pa.float32(), "reward_length": pa.float32(),
        "reward": pa.float32(), "left_out": pa.bool_(), "predicted_index": pa.int32(),
        "yes_probabilities": pa.list_(pa.float32()),
    }  # fmt: skip
    return pa.schema([(field.name, types.get(field.name, pa.string())) for field in fields(kind)])


def _rows(path: Path, batch: int) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(batch):
            for row in rows.to_pylist():
                yield {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
