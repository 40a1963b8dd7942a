"""Samples and graded samples as rows of parquet files: what sampling hands to grading, and grading to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One sampled completion.

    Attributes
    ----------
    sample_id
        Unique in the run: `r01-<row id>-g3`.
    row_id
        The data set row that the prompt was made from.
    group, index
        Number of the prompt in the round, and of the sample among those of its prompt.
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
    group: int
    index: int
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


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, or graded samples, in order. There must be at least one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "group": pa.int32(), "index": pa.int32(), "prompt_token_ids": pa.list_(pa.int32()),
        "token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "seed": pa.int64(),
        "reward_accuracy": pa.float32(), "reward_format": pa.float32(), "reward_length": pa.float32(),
        "reward": pa.float32(), "left_out": pa.bool_(), "predicted_index": pa.int32(),
        "yes_probabilities": pa.list_(pa.float32()),
    }  # fmt: skip
    schema = pa.schema([(field.name, types.get(field.name, pa.string())) for field in fields(samples[0])])
    pq.write_table(pa.Table.from_pylist([asdict(sample) for sample in samples], schema=schema), path)


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The samples that `write_samples` wrote, in order."""
    return tuple(Sample(**row) for row in _rows(path))


def read_graded(path: Path) -> tuple[GradedSample, ...]:
    """The graded samples that `write_samples` wrote, in order."""
    return tuple(GradedSample(**row) for row in _rows(path))


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [
        {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        for row in pq.read_table(path).to_pylist()
    ]
