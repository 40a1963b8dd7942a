"""The plan: every sample in its turn, once per epoch and pass, on one rank."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.training import plan
from hpc_rl.training.plan import Shape
from hpc_rl.training.rollouts import Counts, Group, Rollout, Rollouts


def rollouts_of(sizes: list[int]) -> Rollouts:
    rng = np.random.default_rng(3)
    groups = [
        Group(
            tuple(
                Rollout(
                    f"{g}-{i}", f"row{g}", g, i, np.ones(3, np.int32), np.ones(rng.integers(1, 9), np.int32),
                    np.zeros(1, np.float32), True, {}, float(rng.integers(0, 3)),
                )
                for i in range(size)
            )
        )
        for g, size in enumerate(sizes)
    ]  # fmt: skip
    return Rollouts(tuple(groups), Counts(0, 0, 0, 0, 0, 0), "w")


def make(
    sizes: list[int], shape: Shape, epochs: int = 1, passes: int = 1, seed: int = 0, scale: str = "group"
) -> plan.Plan:
    return plan.make(rollouts_of(sizes), shape, epochs=epochs, passes=passes, scale=scale, run_seed=seed, round=1)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 5), min_size=1, max_size=20),
    st.builds(Shape, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.integers(1, 2),
    st.integers(1, 3),
)
def test_every_sample_is_trained_on_once_per_epoch_and_pass(
    sizes: list[int], shape: Shape, epochs: int, passes: int
) -> None:
    made = make(sizes, shape, epochs, passes)
    times = Counter(item.rollout.id for step in made.steps for item in step.items)
    assert set(times.values()) == {epochs * passes} and len(times) == sum(sizes)
    for step in made.steps:
        assert len(step.batches) == shape.ranks
        assert all(len(rank) == shape.accumulation for rank in step.batches)
        assert all(len(batch) == shape.batch for rank in step.batches for batch in rank)
        assert step.tokens == sum(len(item.rollout.token_ids) for item in step.items)
        fillers = [i for rank in step.batches for batch in rank for i in batch if not i.weight]
        assert all(filler.advantage == 0 for filler in fillers)
    sizes_of_steps = {len(step.items) for step in made.steps}
    assert max(sizes_of_steps) - min(sizes_of_steps) <= 1


def test_complete_groups_fill_the_steps_whole_and_stay_on_one_rank() -> None:
    made = make([4] * 12, Shape(ranks=2, accumulation=2, batch=4))
    assert len(made.steps) == 3
    for step in made.steps:
        assert len(step.items) == 16
        for rank in step.batches:
            assert all(len({item.rollout.group for item in batch}) == 1 for batch in rank)


def test_passes_repeat_a_step_at_once_and_epochs_shuffle_anew() -> None:
    made = make([4] * 6, Shape(1, 1, 8), epochs=2, passes=2)
    assert len(made.steps) == 12
    assert all(made.steps[n] is made.steps[n + 1] for n in range(0, 12, 2))
    first, second = ([i.rollout.id for s in made.steps[a:b:2] for i in s.items] for a, b in ((0, 6), (6, 12)))
    assert first != second and sorted(first) == sorted(second)


def test_the_plan_depends_on_the_seed_and_on_nothing_else() -> None:
    shape = Shape(2, 1, 4)
    assert make([4] * 6, shape).fingerprint() == make([4] * 6, shape).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 6, shape, seed=1).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 6, Shape(1, 2, 4)).fingerprint()


def test_scaling_by_the_batch_uses_the_deviation_of_the_whole_step() -> None:
    made = make([4] * 4, Shape(1, 1, 16), scale="batch")
    (step,) = made.steps
    rewards = np.array([item.rollout.reward for item in step.items])
    for item in step.items:
        mine = [i.rollout.reward for i in step.items if i.rollout.group == item.rollout.group]
        expected = (item.rollout.reward - np.mean(mine)) / (rewards.std(ddof=1) + 1e-4)
        assert item.advantage == pytest.approx(expected, abs=1e-6)
