"""The plan: every sample in its turn, once per epoch and pass, on one rank."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.grading.samples import GradedSample, write_samples
from hpc_rl.training import plan, store
from hpc_rl.training.plan import Shape
from hpc_rl.training.rollouts import Rollouts
from tests.training.conftest import PARTS


def rollouts_of(sizes: list[int]) -> Rollouts:
    """Groups of these sizes, stored and read again."""
    rng = np.random.default_rng(3)
    samples = []
    for group, size in enumerate(sizes):
        for attempt in range(size):
            length, reward = int(rng.integers(1, 9)), float(rng.integers(0, 3))
            samples.append(
                GradedSample(
                    sample_id=f"{group}-{attempt}", row_id=f"row{group}", role="speaker", group=group, attempt=attempt,
                    accepted=True, prompt_token_ids=(1, 1, 1), token_ids=(1,) * length, logprobs=(0.0,) * length,
                    text="", finish_reason="stop", seed=1, weights_hash="w", reward_accuracy=reward, reward_format=1.0,
                    reward_length=0.0, reward=reward, left_out=False, predicted_index=0, yes_probabilities=(),
                )
            )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder) / "graded.parquet", samples, GradedSample)
        return store.read([Path(folder) / "graded.parquet"], PARTS, 4, len(sizes))


def make(
    sizes: list[int], shape: Shape, epochs: int = 1, passes: int = 1, seed: int = 0, scale: str = "group"
) -> plan.Plan:
    return plan.make(rollouts_of(sizes), shape, epochs=epochs, passes=passes, scale=scale, run_seed=seed, round=1)  # type: ignore[arg-type]


def batches_of(step: plan.Step, shape: Shape) -> list[list[tuple[plan.Item, ...]]]:
    """By rank and forward pass."""
    return [[step.batch(rank, number) for number in range(shape.accumulation)] for rank in range(shape.ranks)]


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
    times = Counter(item.rollout.id for step in made for item in step.items)
    assert set(times.values()) == {epochs * passes} and len(times) == sum(sizes)
    for step in made:
        batches = [batch for rank in batches_of(step, shape) for batch in rank]
        assert all(len(batch) == shape.batch for batch in batches)
        dealt = [item for batch in batches for item in batch if item.weight]
        assert [i.rollout.id for i in dealt] == [i.rollout.id for i in step.items], "each on one rank, in one batch"
        assert step.tokens == sum(len(item.rollout.token_ids) for item in step.items)
        fillers = [item for batch in batches for item in batch if not item.weight]
        assert all(filler.advantage == 0 for filler in fillers)
        shortest = min(len(item.rollout.token_ids) for item in step.items)
        assert all(len(filler.rollout.token_ids) == shortest for filler in fillers)
    assert made.tokens == sum(step.tokens for step in made)
    sizes_of_steps = {len(step.items) for step in made}
    assert max(sizes_of_steps) - min(sizes_of_steps) <= 1


def test_complete_groups_fill_the_steps_whole_and_stay_on_one_rank() -> None:
    made = make([4] * 12, Shape(ranks=2, accumulation=2, batch=4))
    assert len(made) == 3
    for step in made:
        assert len(step.items) == 16
        for rank in batches_of(step, made.shape):
            assert all(len({item.rollout.group for item in batch}) == 1 for batch in rank)


def test_passes_repeat_a_step_at_once_and_epochs_shuffle_anew() -> None:
    made = make([4] * 6, Shape(1, 1, 8), epochs=2, passes=2)
    assert len(made) == 12
    turns = [[item.rollout.id for item in step.items] for step in made]
    assert all(turns[n] == turns[n + 1] for n in range(0, 12, 2))
    first, second = ([i.rollout.id for s in made[a:b:2] for i in s.items] for a, b in ((0, 6), (6, 12)))
    assert first != second and sorted(first) == sorted(second)


def test_the_plan_depends_on_the_seed_and_on_nothing_else() -> None:
    shape = Shape(2, 1, 4)
    assert make([4] * 6, shape).fingerprint() == make([4] * 6, shape).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 6, shape, seed=1).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 6, Shape(1, 2, 4)).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 5 + [3], shape).fingerprint()
    assert make([4] * 6, shape).fingerprint() != make([4] * 6, shape, scale="batch").fingerprint()


def test_scaling_by_the_batch_uses_the_deviation_of_the_whole_step() -> None:
    made = make([4] * 4, Shape(1, 1, 16), scale="batch")
    (step,) = made
    rewards = np.array([item.rollout.reward for item in step.items])
    for item in step.items:
        mine = [i.rollout.reward for i in step.items if i.rollout.group == item.rollout.group]
        expected = (item.rollout.reward - np.mean(mine)) / (rewards.std(ddof=1) + 1e-4)
        assert item.advantage == pytest.approx(expected, abs=1e-6)
