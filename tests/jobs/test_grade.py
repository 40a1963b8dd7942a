"""The grade stage on samples of which some do not count: those are left alone, and what they leave short is counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpc_rl.data.lewis import read_rows, rows_of_round
from hpc_rl.grading.samples import Sample, read_graded, write_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training import store
from jobs import grade
from tests.jobs.listening import arguments, listener_thread

ACCEPTED = {0: (0, 2, 3, 5), 1: (1, 4), 2: (), 6: (0, 1, 2, 3), 7: (0, 1, 2)}
"""Attempts that count, of six, by group. The shard of groups 3, 4 and 5 is empty: its prompts were dropped."""


@pytest.fixture
def sampled(new_run: Callable[..., Workspace]) -> Workspace:
    """A round of 8 prompts in shards of 3, sampled by hand."""
    ws = new_run()
    job = load(ws.root, 1, "sample")
    job.folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of_round(
        read_rows(manifest.read(ws, 0, "dataset", 0).path("train.parquet")), 1, prompts_per_round=8, seed=0
    )
    for shard in job.shards():
        samples = [
            Sample(
                sample_id=f"r01-{rows[group].id}-g{n}", row_id=rows[group].id, role="speaker", group=group, attempt=n,
                accepted=n in ACCEPTED[group], prompt_token_ids=(1, 2), token_ids=(3, n), logprobs=(-1.0, -0.5),
                text=f"<thinking>so</thinking><coarse>A ring</coarse><detailed>It is number {n}.</detailed>",
                finish_reason="stop", seed=n, weights_hash="w",
            )
            for group in range(3 * shard.index, min(8, 3 * shard.index + 3)) if group in ACCEPTED
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
    graded = [one for path in paths for one in read_graded(path)]
    assert [(one.group, one.attempt) for one in graded] == [(g, n) for g, numbers in ACCEPTED.items() for n in numbers]
    assert not any(one.left_out for one in graded) and all(one.yes_probabilities for one in graded)
    counted = [[one.metrics[name] for name in ("attempts", "samples", "groups", "short_groups")] for one in made]
    assert counted == [[18, 6, 3, 2], [0, 0, 0, 0], [12, 7, 2, 1]]
    lines = [len(one.path("predictions.jsonl").read_text().splitlines()) for one in made]
    assert lines == [6, 0, 7]

    counts = store.read(paths, group_size=4, groups=8).counts
    assert (counts.samples, counts.groups, counts.dropped_groups, counts.short_groups) == (13, 8, 4, 2)
