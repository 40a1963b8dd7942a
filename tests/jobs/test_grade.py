"""The grade stage on samples of which some do not count: those are left alone, and what they leave short is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from hpc_rl.data.lewis import read_rows, rows_of_round
from hpc_rl.grading.game import LewisGraded
from hpc_rl.grading.samples import Sample, read_graded, write_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.data import store
from jobs.lewis import grade
from tests.jobs.listening import arguments, listener_thread

ACCEPTED = {0: (0, 2, 3, 5), 1: (1, 4), 2: (), 6: (0, 1, 2, 3), 7: (0, 1, 2)}
"""Attempts that count, of six, by group. The shard of groups 3, 4 and 5 is empty: its prompts were dropped."""


@pytest.fixture
def sampled(new_run: Callable[..., Workspace]) -> Workspace:
    """A round of 8 prompts in shards of 3, sampled by hand."""
    return sample_by_hand(new_run(), {(group, "speaker"): numbers for group, numbers in ACCEPTED.items()})


def sample_by_hand(ws: Workspace, accepted: Mapping[tuple[int, str], Sequence[int]]) -> Workspace:
    """Publish six attempts for each group and role, of which the numbers given count."""
    job = load(ws.root, 1, "sample")
    job.folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of_round(
        read_rows(manifest.read(ws, 0, "dataset", 0).path("train.parquet")), 1, prompts_per_round=8, seed=0
    )
    for shard in job.shards():
        samples = [
            Sample(
                sample_id=f"r01-{rows[group].id}-{role}-g{n}", row_id=rows[group].id, role=role, group=group, attempt=n,
                accepted=n in numbers, prompt_token_ids=(1, 2), token_ids=(3, n), logprobs=(-1.0, -0.5),
                text=f"<thinking>so</thinking><coarse>A ring</coarse><detailed>It is number {n}.</detailed>",
                finish_reason="stop", seed=n, weights_hash="w",
            )
            for (group, role), numbers in accepted.items() if group // 3 == shard.index
            for n in range(6)
        ]  # fmt: skip
        path = shard.output("samples.parquet")
        write_samples(path, samples, Sample)
        assert shard.commit([path], made_from={})
    return ws


def test_only_accepted_attempts_are_graded_and_short_groups_are_counted(sampled: Workspace) -> None:
    with listener_thread(sampled):
        assert grade.main(arguments(sampled)) == 0
    made = [manifest.read(sampled, 1, "grade", shard) for shard in range(3)]
    paths = [one.path("graded.parquet") for one in made]
    graded = [one for path in paths for one in read_graded(path, LewisGraded)]
    assert [(one.group, one.attempt) for one in graded] == [(g, n) for g, numbers in ACCEPTED.items() for n in numbers]
    assert not any(one.left_out for one in graded) and all(one.yes_probabilities for one in graded)
    counted = [[one.metrics[name] for name in ("attempts", "samples", "groups", "short_groups")] for one in made]
    assert counted == [[18, 6, 3, 2], [0, 0, 0, 0], [12, 7, 2, 1]]
    lines = [len(one.path("predictions.jsonl").read_text().splitlines()) for one in made]
    assert lines == [6, 0, 7]

    counts = store.read(paths, parts=("accuracy", "format", "length"), group_size=4, groups=8).counts
    assert (counts.samples, counts.groups, counts.dropped_groups, counts.short_groups) == (13, 8, 4, 2)


def test_the_roles_of_a_row_are_groups_of_their_own(new_run: Callable[..., Workspace]) -> None:
    """Four of the one and two of the other are not six of one; nor are two groups of equal rewards one of different."""
    ws = sample_by_hand(new_run(), {(0, "helpful"): (0, 2, 3, 5), (0, "sneaky"): (1, 4), (1, "helpful"): ()})
    with listener_thread(ws):
        assert grade.main(arguments(ws)) == 0
    made = manifest.read(ws, 1, "grade", 0)
    assert (made.metrics["samples"], made.metrics["groups"], made.metrics["short_groups"]) == (6, 3, 2)
    graded = [
        replace(one, reward=float(one.role == "helpful"), left_out=False)
        for one in read_graded(made.path("graded.parquet"), LewisGraded)
    ]
    assert grade.summary(graded, 0.0)["groups_without_gradient"] == 2
