"""Rows survive the disk, shards merge in any order, and rounds walk through the epochs without repeating a row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.data.lewis import GameRow, Rows, image_root, merge_rows, read_rows, rows_of_round, shard_of, write_rows
from hpc_rl.run.workspace import Workspace


def row(i: int) -> GameRow:
    return GameRow(f"train-cup-{i:05d}", f"i{i}.png", ("é.png", "b.png"), ("A", "B"), "What?", "B", 1, "cup", "mug")


def test_rows_survive_the_disk_in_order(tmp_path: Path) -> None:
    rows = [row(i) for i in (3, 1, 2)]
    write_rows(tmp_path / "rows.parquet", rows)
    assert list(read_rows(tmp_path / "rows.parquet")) == rows
    write_rows(tmp_path / "none.parquet", [])
    assert list(read_rows(tmp_path / "none.parquet")) == []


@given(st.integers(0, 12), st.integers(-15, 15), st.integers(-15, 15))
def test_rows_are_taken_like_those_of_a_list(size: int, start: int, stop: int) -> None:
    plain = [row(i) for i in range(size)]
    rows = Rows.of(plain)
    assert (len(rows), rows.ids) == (size, [one.id for one in plain])
    assert list(rows[start:stop]) == plain[start:stop]
    if -size <= start < size:
        assert rows[start] == plain[start]
        assert rows[start:][0] == plain[start]
        assert list(rows.take([start % size, 0])) == [plain[start], plain[0]]
    else:
        with pytest.raises(IndexError):
            rows[start]


@given(st.lists(st.integers(0, 3), max_size=40), st.randoms())
def test_shards_merge_to_the_same_rows_in_any_order(places: list[int], shuffler: random.Random) -> None:
    shards = [[row(i) for i, place in enumerate(places) if place == shard] for shard in range(4)]
    merged = merge_rows(shards, 7)
    shuffler.shuffle(shards)
    assert merge_rows(shards, 7) == merged
    assert sorted(merged, key=lambda one: one.id) == [row(i) for i in range(len(places))]


def test_merged_rows_are_mixed_by_the_seed() -> None:
    rows = [row(i) for i in range(100)]
    orders = [[one.id for one in merge_rows([rows], seed)] for seed in (7, 8)]
    assert orders[0] != orders[1] != sorted(orders[0]) != orders[0]


def test_a_row_that_comes_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="same id"):
        merge_rows([[row(1)], [row(1)]], 7)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3), st.randoms())
def test_rounds_walk_through_epochs(size: int, per_round: int, seed: int, shuffler: random.Random) -> None:
    rows = Rows.of(row(i) for i in range(size))
    if per_round > size:
        with pytest.raises(ValueError, match=r"data.train_rows or lower sample.prompts_per_round"):
            rows_of_round(rows, 1, prompts_per_round=per_round, seed=seed)
        return
    rounds_per_epoch = size // per_round
    for epoch in range(2):
        ids: list[str] = []
        for round in range(epoch * rounds_per_epoch + 1, (epoch + 1) * rounds_per_epoch + 1):
            part = rows_of_round(rows, round, prompts_per_round=per_round, seed=seed)
            shuffled = list(rows)
            shuffler.shuffle(shuffled)
            again = rows_of_round(Rows.of(shuffled), round, prompts_per_round=per_round, seed=seed)
            assert list(again) == list(part)
            assert len(part) == per_round
            ids += [one.id for one in part]
        assert len(set(ids)) == len(ids) == rounds_per_epoch * per_round


def test_epochs_and_seeds_differ() -> None:
    rows = Rows.of(row(i) for i in range(50))
    orders = {
        tuple(rows_of_round(rows, round, prompts_per_round=50, seed=seed).ids) for round in (1, 2) for seed in (0, 1)
    }
    assert len(orders) == 4


@given(st.integers(0, 50), st.integers(1, 20))
def test_shards_cut_the_round_without_gap_or_overlap(size: int, shard_size: int) -> None:
    rows = list(range(size))
    shards = [shard_of(rows, index, shard_size) for index in range(-(-size // shard_size))]
    assert [one for shard in shards for one in shard] == rows
    assert all(shards)


def test_pictures_of_a_run_without_an_image_root_are_its_own(tmp_path: Path) -> None:
    assert image_root(Workspace(tmp_path), None) == tmp_path / "images"
    assert image_root(Workspace(tmp_path), "/photos") == Path("/photos")
