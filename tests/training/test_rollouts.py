"""Groups and advantages: what is left out, dropped and counted."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.grading.game import LewisGraded
from hpc_rl.grading.samples import write_samples
from hpc_rl.training.data import plan, rollouts, store
from hpc_rl.training.data.rollouts import advantages, have_equal_rewards
from hpc_rl.training.errors import NothingToLearn, UnusableData
from tests.training.conftest import PARTS


def graded(
    group: int, attempt: int, reward: float | None = 1.0, role: str = "speaker", **changes: object
) -> LewisGraded:
    sample = LewisGraded(
        sample_id=f"r01-{group}-{role}-g{attempt}", row_id=f"row{group}", role=role, group=group, attempt=attempt,
        accepted=True, prompt_token_ids=(5, 6, 7),
        token_ids=(8, 9), logprobs=(-0.5, -1.5), text="x", finish_reason="stop", seed=1, weights_hash="w",
        reward_accuracy=reward, reward_format=1.0, reward_length=0.1, reward=reward, left_out=reward is None,
        predicted_index=0, yes_probabilities=(0.1, 0.2),
    )  # fmt: skip
    return replace(sample, **changes)


def read(
    tmp_path: Path, *shards: list[LewisGraded], group_size: int = 4, groups: int | None = None
) -> rollouts.Rollouts:
    paths = [tmp_path / f"{number}.parquet" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write_samples(path, shard, LewisGraded)
    return store.read(
        paths, PARTS, group_size, groups or len({(one.group, one.role) for shard in shards for one in shard})
    )


def test_samples_come_back_as_groups_in_order_with_their_tokens(tmp_path: Path) -> None:
    found = read(tmp_path, [graded(1, 1, 0.0), graded(1, 0)], [graded(0, i, float(i)) for i in range(4)])
    assert [[r.id for r in group] for group in found.groups] == [
        [f"r01-0-speaker-g{i}" for i in range(4)], ["r01-1-speaker-g0", "r01-1-speaker-g1"]
    ]  # fmt: skip
    one = next(found.groups)[2]
    assert (one.prompt_ids.tolist(), one.token_ids.tolist(), one.logprobs.tolist()) == ([5, 6, 7], [8, 9], [-0.5, -1.5])
    assert one.parts == {"accuracy": 2.0, "format": 1.0, "length": pytest.approx(0.1)} and one.reward == 2.0
    assert one.finished and found.weights_hash == "w" and len(found) == 6


def test_groups_are_those_of_the_files_where_nobody_knows_their_number(tmp_path: Path) -> None:
    """Shards may be empty; a group without any grade is one that is dropped."""
    shards = [graded(0, i, float(i)) for i in range(4)], [], [graded(1, i, None) for i in range(4)]
    assert read(tmp_path, *shards).counts.groups == 2
    paths = [tmp_path / f"{number}.parquet" for number in range(3)]
    found = store.read(paths, PARTS, 4, None).counts
    assert (found.groups, found.dropped_groups, found.left_out) == (2, 1, 4)


def test_a_sample_without_a_score_is_out_of_its_group_and_a_group_of_one_is_dropped(tmp_path: Path) -> None:
    whole = [graded(0, i, float(i % 2)) for i in range(4)]
    short = [graded(1, 0, 2.0), graded(1, 1, None), graded(1, 2, 0.0), graded(1, 3, 1.0)]
    lost = [graded(2, i, 1.0 if i == 0 else None) for i in range(4)]
    equal = [graded(3, i, 0.5) for i in range(4)]
    found = read(tmp_path, [*whole, *short, *lost, *equal], groups=5)  # nothing was accepted for the fifth
    assert found.counts == rollouts.Counts(
        samples=16, left_out=4, groups=5, dropped_groups=2, short_groups=1, equal_groups=1
    )
    groups = list(found.groups)
    assert [r.id for r in groups[1]] == ["r01-1-speaker-g0", "r01-1-speaker-g2", "r01-1-speaker-g3"]
    rewards = np.array([2.0, 0.0, 1.0])
    worth = np.split(advantages(found.rewards, found.starts), found.starts[1:-1])
    assert worth[1] == pytest.approx((rewards - 1) / (rewards.std(ddof=1) + 1e-4), rel=1e-6)
    assert have_equal_rewards(found.rewards, found.starts).tolist() == [False, False, True] and not worth[2].any()


def test_roles_that_answer_the_same_prompt_are_groups_of_their_own(tmp_path: Path) -> None:
    """V12: a helpful solution is compared with helpful ones alone, in whatever shard and order they come."""
    sneaky = [graded(7, i, float(10 + i), "sneaky") for i in range(3)]
    helpful = [graded(7, i, float(i % 2), "helpful") for i in range(4)]
    alone = [graded(8, 0, 1.0, "helpful"), graded(8, 0, 0.0, "sneaky"), *(graded(9, i, 1.0, "sneaky") for i in (0, 1))]
    found = read(tmp_path, [*sneaky, *alone], helpful, groups=6)
    assert [[(one.group, one.role, one.attempt) for one in group] for group in found.groups] == [
        [(7, "helpful", i) for i in range(4)],
        [(7, "sneaky", i) for i in range(3)],
        [(9, "sneaky", i) for i in range(2)],
    ]
    assert found.counts == rollouts.Counts(
        samples=11, left_out=0, groups=6, dropped_groups=3, short_groups=2, equal_groups=1
    )
    assert found.roles == ("helpful", "sneaky")
    worth = np.split(advantages(found.rewards, found.starts, "none"), found.starts[1:-1])
    assert [list(one) for one in worth] == [[-0.5, 0.5, -0.5, 0.5], [-1, 0, 1], [0, 0]]
    shape = plan.Shape(ranks=1, accumulation=1, batch=9)
    (step,) = plan.make(found, shape, epochs=1, run_seed=0, round=1)
    assert found.share_of_equal(step.places) == 1 / 3


def test_equal_groups_can_be_taken_out_and_are_counted(tmp_path: Path) -> None:
    equal = [graded(group, i, 0.5) for group in (0, 2) for i in range(2)]
    unequal = [graded(group, i, float(i)) for group in (1, 3) for i in range(3)]
    found = read(tmp_path, [*equal, *unequal])
    left = found.without_equal_groups()
    assert [[one.id for one in group] for group in left.groups] == [
        [f"r01-{group}-speaker-g{i}" for i in range(3)] for group in (1, 3)
    ]
    assert left.counts == found.counts and left.counts.equal_groups == 2 and len(left) == 6
    assert left.without_equal_groups() is left
    with pytest.raises(NothingToLearn, match=r"equal within each of the 4 groups.* mean reward 2, accuracy 0\.8"):
        found.with_rewards(np.full(len(found), 2.0)).without_equal_groups()


def test_other_rewards_make_other_advantages_and_another_plan(tmp_path: Path) -> None:
    found = read(tmp_path, [graded(0, i, 0.5) for i in range(2)])
    other = found.with_rewards(np.array([0.25, 0.75]))
    assert [one.reward for one in next(other.groups)] == [0.25, 0.75] and other.counts.equal_groups == 0
    assert [one.reward for one in next(found.groups)] == [0.5, 0.5] and found.counts.equal_groups == 1
    plans = [plan.make(one, plan.Shape(1, 1, 2), epochs=1, run_seed=0, round=1) for one in (found, other)]
    assert plans[0].fingerprint() != plans[1].fingerprint()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 21), min_size=2, max_size=8), min_size=1), st.sampled_from(["group", "none"]))
def test_advantages_are_those_of_trl(points: list[list[int]], scale: str) -> None:
    from trl.trainer.utils import nanstd

    from hpc_rl.training import trl_parts  # noqa: F401  (TRL without vLLM)

    starts = np.cumsum([0, *map(len, points)])
    ours = advantages(np.concatenate(points) / 10, starts, scale)  # type: ignore[arg-type]
    for group, found in zip(points, np.split(ours, starts[1:-1]), strict=True):
        rewards = torch.tensor([point / 10 for point in group], dtype=torch.float64)
        theirs = rewards - torch.nanmean(rewards)
        if scale == "group":
            theirs = theirs / (nanstd(rewards, dim=0) + 1e-4)
        assert found == pytest.approx(theirs.numpy(), abs=1e-6)  # its n / (n - 1) has 32 bits


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        ([graded(0, 0), graded(0, 0)], "r01-0-speaker-g0 is there twice"),
        ([graded(0, 0), graded(0, 1, weights_hash="v")], "different weights: v, w"),
        ([graded(0, 0), graded(0, 1, logprobs=(-1.0,))], "r01-0-speaker-g1 .* 2 tokens and 1 log-prob"),
        (
            [graded(0, 0), graded(0, 1, logprobs=(-1.0, float("nan")))],
            "r01-0-speaker-g1 .* a log-probability that is no number",
        ),
        ([graded(0, 0), graded(0, 1, token_ids=(), logprobs=())], "r01-0-speaker-g1 .of row row0. in .* no tokens"),
        ([graded(0, 0), graded(0, 1, float("inf"))], "r01-0-speaker-g1 .* has a reward that is no number"),
        ([graded(0, 0), graded(0, 1, reward_format=float("nan"))], "g1 .* has a reward_format that is no number"),
        ([graded(0, 0), graded(1, 0), graded(1, 1, None)], "1 of 3 samples were left out: no group has two"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path: Path, samples: list[LewisGraded], complaint: str) -> None:
    with pytest.raises(UnusableData, match=complaint):
        read(tmp_path, *([sample] for sample in samples))


def test_samples_come_back_from_every_chunk_as_they_were_graded(tmp_path: Path) -> None:
    """More samples than fit into a chunk, a read or what is kept of chunks; of varied lengths, some of them empty."""
    rng = np.random.default_rng(0)
    shards, expected = [], {}
    for shard in range(3):
        samples = []
        for group in range(500 * shard, 500 * shard + 500):
            for attempt in range(4):
                length = int(rng.integers(1, 30))
                one = graded(
                    group, attempt, None if rng.random() < 0.1 else float(rng.integers(0, 2)),
                    prompt_token_ids=tuple(rng.integers(0, 1000, int(rng.integers(1, 20))).tolist()),
                    token_ids=tuple(rng.integers(0, 1000, length).tolist()),
                    logprobs=tuple(float(np.float32(x)) for x in -rng.random(length)),
                    finish_reason=str(rng.choice(["stop", "length"])),
                )  # fmt: skip
                samples.append(one)
                if not one.left_out:
                    expected[one.sample_id] = one
        shards.append(samples)
    found = read(tmp_path, *shards, [])
    together = [rollout for group in found.groups for rollout in group]
    assert len(together) == len(found)
    alone = len(expected) - len(found)
    assert 0 <= alone == sum(size == 1 for size in Counter(one.group for one in expected.values()).values())
    shuffled = rng.permutation(len(found))
    for one in (*together, *found.rows(shuffled)):
        sample = expected[one.id]
        assert (one.row_id, one.group, one.attempt, one.reward) == (
            sample.row_id, sample.group, sample.attempt, sample.reward
        )  # fmt: skip
        assert one.prompt_ids.tolist() == list(sample.prompt_token_ids)
        assert one.token_ids.tolist() == list(sample.token_ids) and one.token_ids.dtype == np.int32
        assert one.logprobs.tolist() == list(sample.logprobs)
        assert one.finished == (sample.finish_reason == "stop")


def test_the_files_have_no_names_once_they_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    found = read(tmp_path, [graded(0, 0), graded(0, 1)])
    assert list(node.iterdir()) == []
    assert [r.id for r in next(found.groups)] == ["r01-0-speaker-g0", "r01-0-speaker-g1"]
    with pytest.raises(UnusableData):
        read(tmp_path, [graded(0, 0)], [graded(0, 1, weights_hash="v")])
    assert list(node.iterdir()) == []


def test_an_id_that_is_there_twice_is_found_across_files_and_among_those_left_out(tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match=r"r01-0-speaker-g1 is there twice, the second time in .*1\.parquet"):
        read(tmp_path, [graded(0, 0), graded(0, 1)], [graded(1, 0), graded(1, 1, None, sample_id="r01-0-speaker-g1")])
