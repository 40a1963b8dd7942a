"""The plan: every unit in its turn, once per epoch and pass, on one rank, whatever the shape of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpc_rl.training.data import plan
from hpc_rl.training.data.plan import Plan, Shape
from hpc_rl.training.data.units import INDEX, Units, id_hashes

SHAPES = st.builds(Shape, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))


@dataclass(frozen=True)
class Unit:
    """What is dealt out."""

    id: str
    group: int
    length: int


def units_of(sizes: list[int], digest: str = "d") -> Units[Unit]:
    """Groups of these sizes; lengths differ."""
    rng = np.random.default_rng(3)
    units = [Unit(f"{g}-{i}", g, int(rng.integers(1, 9))) for g, size in enumerate(sizes) for i in range(size)]
    index = np.zeros(len(units), np.dtype(INDEX))
    index["id_hash"], index["length"] = id_hashes([unit.id for unit in units]), [unit.length for unit in units]
    index["row"] = np.arange(len(units))

    def reader(places: NDArray[Any]) -> list[Unit]:
        return [units[place["row"]] for place in places]

    return Units(index, np.concatenate(([0], np.cumsum(sizes))), reader, digest)


def make(sizes: list[int], shape: Shape, epochs: int = 1, passes: int = 1, seed: int = 0) -> Plan[Unit]:
    return plan.make(units_of(sizes), shape, epochs=epochs, passes=passes, run_seed=seed, round=1)


def passes_of(step: plan.Step[Unit]) -> list[list[tuple[plan.Item[Unit], ...]]]:
    """By rank and forward pass."""
    return [[step.batch(rank, n) for n in range(step.shape.accumulation)] for rank in range(step.shape.ranks)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=20), SHAPES, st.integers(1, 2), st.integers(1, 3))
def test_every_unit_is_trained_on_once_per_epoch_and_pass(
    sizes: list[int], shape: Shape, epochs: int, passes: int
) -> None:
    made = make(sizes, shape, epochs, passes)
    times = Counter(item.unit.id for step in made for item in step.items)
    assert set(times.values()) == {epochs * passes} and len(times) == sum(sizes)
    for step in made:
        batches = [batch for rank in passes_of(step) for batch in rank]
        assert all(1 <= len(batch) <= shape.batch for batch in batches)
        dealt = [item for batch in batches for item in batch if item.weight]
        assert [item.unit.id for item in dealt] == [item.unit.id for item in step.items], "each on one rank, once"
        fillers = [batch for batch in batches if not batch[0].weight]
        shortest = min(item.unit.length for item in step.items)
        assert all(len(batch) == 1 and batch[0].unit.length == shortest for batch in fillers)
        assert step.total("length") == sum(item.unit.length for item in step.items)
    assert made.total("length") == sum(step.total("length") for step in made)
    sizes_of_steps = {len(step.items) for step in made}
    assert max(sizes_of_steps) - min(sizes_of_steps) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), SHAPES)
def test_shares_make_a_mean_over_passes_that_over_all_units(sizes: list[int], shape: Shape) -> None:
    for step in make(sizes, shape):
        total = 0.0
        for rank, batches in enumerate(passes_of(step)):
            for number, batch in enumerate(batches):
                mean = np.mean([item.unit.length for item in batch])
                total += mean * step.share(rank, number) / shape.accumulation / shape.ranks
        assert total == pytest.approx(np.mean([item.unit.length for item in step.items]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=20), st.sampled_from([(4, 1, 2), (1, 1, 8), (2, 4, 1), (1, 2, 4)])
)
def test_a_step_has_the_same_units_on_any_number_of_ranks_and_passes(
    sizes: list[int], other: tuple[int, int, int]
) -> None:
    ours, theirs = make(sizes, Shape(2, 2, 2)), make(sizes, Shape(*other))
    assert [list(step.places) for step in ours] == [list(step.places) for step in theirs]
    assert ours.fingerprint() == theirs.fingerprint(), "a checkpoint can be continued in other forward passes"


def test_complete_groups_fill_the_steps_whole_and_stay_on_one_rank() -> None:
    made = make([4] * 12, Shape(ranks=2, accumulation=2, batch=4))
    assert len(made) == 3
    for step in made:
        assert len(step.items) == 16
        for rank in passes_of(step):
            assert all(len({item.unit.group for item in batch}) == 1 for batch in rank)


def test_passes_repeat_a_step_at_once_and_epochs_shuffle_anew() -> None:
    made = make([4] * 6, Shape(1, 1, 8), epochs=2, passes=2)
    assert len(made) == 12
    turns = [[item.unit.id for item in step.items] for step in made]
    assert all(turns[n] == turns[n + 1] for n in range(0, 12, 2))
    first, second = ([item.unit.id for s in made[a:b:2] for item in s.items] for a, b in ((0, 6), (6, 12)))
    assert first != second and sorted(first) == sorted(second)


def test_the_plan_depends_on_data_seed_and_size_of_a_step_and_on_nothing_else() -> None:
    shape = Shape(2, 1, 4)
    ours = make([4] * 6, shape).fingerprint()
    assert ours == make([4] * 6, shape).fingerprint()
    others = [
        make([4] * 6, shape, seed=1), make([4] * 6, Shape(2, 1, 3)), make([4] * 5 + [3], shape),
        make([4] * 6, shape, passes=2), make([4] * 6, shape, epochs=2),
        plan.make(units_of([4] * 6, "other contents"), shape, epochs=1, run_seed=0, round=1),
    ]  # fmt: skip
    assert ours not in {other.fingerprint() for other in others}


def test_units_can_be_dealt_out_over_more_steps() -> None:
    units, shape = units_of([1] * 10), Shape(1, 2, 2)
    made = plan.make(units, shape, epochs=2, run_seed=0, round=1, steps=7)
    assert len(made) == 14 and {len(step.items) for step in made} == {1, 2}
    assert Counter(item.place for step in made for item in step.items) == dict.fromkeys(range(10), 2)
    with pytest.raises(ValueError, match=r"10 units in steps of up to 4 cannot be dealt out over 2 steps"):
        plan.make(units, shape, epochs=1, run_seed=0, round=1, steps=2)


def test_of_more_steps_than_units_some_have_fillers_only() -> None:
    made = plan.make(units_of([1] * 3), Shape(2, 2, 1), epochs=1, run_seed=0, round=1, steps=5)
    assert sorted(len(step.items) for step in made) == [0, 0, 1, 1, 1]
    for step in made:
        for number in range(2):
            assert sum(step.rows(number)) == (len(step.items) if number == 1 else 0), "what there is comes last"
            for rank in range(2):
                (item,) = step.batch(rank, number)
                assert item.weight == step.rows(number)[rank] and step.share(rank, number) == 4 * item.weight


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 15))
def test_parts_of_units_are_all_of_them_in_order_and_split_no_group(sizes: list[int], parts: int) -> None:
    units = units_of(sizes)
    found = [units.part(number, parts) for number in range(parts)]
    assert [unit for part in found for unit in part.rows(slice(None))] == units.rows(slice(None))
    assert [size for part in found for size in np.diff(part.starts)] == sizes
    groups = [len(part.starts) - 1 for part in found]
    assert max(groups) - min(groups) <= 1
    assert all(part.starts[0] == 0 and part.starts[-1] == len(part) for part in found)


def test_a_plan_in_order_goes_through_all_units_once() -> None:
    made = plan.in_order(units_of([2, 3, 2]), Shape(2, 1, 2))
    assert [item.place for step in made for item in step.items] == list(range(7)) and len(made) == 2
