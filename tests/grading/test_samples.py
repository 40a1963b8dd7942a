"""Stored samples: what was written comes back, in one order, in pieces, and also when it is nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_rl.grading.game import LewisGraded
from hpc_rl.grading.samples import (
    ROWS,
    Sample,
    iter_graded,
    iter_samples,
    read_graded,
    read_samples,
    write_samples,
)


def sample(group: int = 0, attempt: int = 0, role: str = "speaker", tokens: int = 3) -> Sample:
    """A sample whose content tells which one it is."""
    lot = random.Random(f"{group} {role} {attempt}")
    return Sample(
        sample_id=f"r01-row{group}-{role}-g{attempt}", row_id=f"row{group}", role=role, group=group, attempt=attempt,
        accepted=lot.random() < 0.5, prompt_token_ids=tuple(lot.randrange(150_000) for _ in range(5)),
        token_ids=tuple(lot.randrange(150_000) for _ in range(tokens)),
        logprobs=tuple(float(np.float32(-lot.random())) for _ in range(tokens)), text=f"a ring, {lot.random()}",
        finish_reason="stop", seed=lot.randrange(2**31), weights_hash="w",
    )  # fmt: skip


def graded(one: Sample, **changes: object) -> LewisGraded:
    values = {
        "reward_accuracy": 1.0, "reward_format": 1.0, "reward_length": 0.5, "reward": 2.5, "left_out": False,
        "predicted_index": 2, "yes_probabilities": (0.25, 0.5, 0.75),
    }  # fmt: skip
    return LewisGraded(**vars(one), **{**values, **changes})  # type: ignore[arg-type]


places = st.sets(
    st.tuples(st.integers(0, 5), st.sampled_from(["helpful", "sneaky"]), st.integers(0, 7)), min_size=1, max_size=20
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(places, st.randoms(use_true_random=False))
def test_samples_come_back_by_group_role_and_attempt_whatever_finished_first(
    tmp_path: Path, drawn: set[tuple[int, str, int]], order: random.Random
) -> None:
    ordered = [sample(group, attempt, role) for group, role, attempt in sorted(drawn)]
    finished = list(ordered)
    order.shuffle(finished)
    write_samples(tmp_path / "finished", finished, Sample)
    write_samples(tmp_path / "ordered", ordered, Sample)
    assert list(read_samples(tmp_path / "finished")) == ordered
    assert (tmp_path / "finished").read_bytes() == (tmp_path / "ordered").read_bytes()


def test_tokens_are_int32_and_logprobs_float32(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", [sample()], Sample)
    schema = pq.read_schema(tmp_path / "samples")
    assert [schema.field(name).type.value_type for name in ("prompt_token_ids", "token_ids", "logprobs")] == [
        pa.int32(), pa.int32(), pa.float32()
    ]  # fmt: skip
    assert (schema.field("accepted").type, schema.field("attempt").type) == (pa.bool_(), pa.int32())


def test_graded_samples_come_back_with_what_is_missing(tmp_path: Path) -> None:
    whole = graded(sample(0, 0))
    out = graded(sample(0, 1), reward_accuracy=None, reward=None, left_out=True, yes_probabilities=())
    write_samples(tmp_path / "graded", [out, whole], LewisGraded)
    path = tmp_path / "graded"
    assert read_graded(path, LewisGraded) == tuple(iter_graded(path, LewisGraded)) == (whole, out)
    assert read_samples(path) == (sample(0, 0), sample(0, 1)), "what was added is left out"


def test_an_open_file_takes_the_same_and_stays_open(tmp_path: Path) -> None:
    write_samples(tmp_path / "named", [sample()], Sample)
    with (tmp_path / "open").open("w+b") as file:
        write_samples(file, [sample()], Sample)
        file.seek(0)
        assert file.read() == (tmp_path / "named").read_bytes()


@pytest.mark.parametrize("kind", [Sample, LewisGraded])
def test_a_shard_without_samples_has_the_columns_of_the_others(tmp_path: Path, kind: type[Sample]) -> None:
    write_samples(tmp_path / "none", [], kind)
    write_samples(tmp_path / "one", [graded(sample()) if kind is LewisGraded else sample()], kind)
    assert pq.read_schema(tmp_path / "none") == pq.read_schema(tmp_path / "one")
    assert read_samples(tmp_path / "none") == read_graded(tmp_path / "none", kind) == ()


def test_an_attempt_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attempt 2 at row1 as speaker is there twice"):
        write_samples(tmp_path / "twice", [sample(1, 2), sample(1, 1), sample(1, 2)], Sample)
    assert not (tmp_path / "twice").exists()


def test_a_shard_is_read_in_pieces(tmp_path: Path) -> None:
    """However large it is, a reader holds a row group of it and `batch` samples."""
    path, many = tmp_path / "many", 20 * ROWS
    large = sample(tokens=400)
    write_samples(path, [Sample(**{**vars(large), "attempt": n}) for n in range(many)], Sample)
    assert pq.ParquetFile(path).num_row_groups == 20
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for one in iter_samples(path, batch=16):
        assert one.attempt == seen
        seen += 1
        most = max(most, pa.total_allocated_bytes() - before)
    whole = pq.read_table(path).nbytes
    assert seen == many and most < whole / 5, f"{most} bytes at once of {whole}"
