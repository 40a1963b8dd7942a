"""Prompts that leave no room for a completion, from the data set to the groups of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_rl.data.lewis import image_root, read_rows, rows_of_round, write_rows
from hpc_rl.grading.samples import read_samples
from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.sampling.prompts import PromptError
from hpc_rl.sampling.record import read_records
from hpc_rl.training.data import store
from jobs import sample
from jobs.lewis import evaluate, grade
from tests.jobs.listening import arguments, listener_thread

NewRun = Callable[..., Workspace]
LONG = 4  # of the round's 8 rows: the second of the shard of 3, 4 and 5


def with_a_long_row(ws: Workspace) -> str:
    """Give one row of round 1 a problem of a thousand words, as if the data set had been made so; its id."""
    rows = read_rows(manifest.read(ws, 0, "dataset", 0).path("train.parquet"))
    long = rows_of_round(rows, 1, prompts_per_round=8, seed=0)[LONG].id
    change_row(ws, "train", long, speaker_problem="ring " * 1000)
    return long


def change_row(ws: Workspace, of: str, id: str, **changes: str) -> None:
    """Make the data set anew, with another row."""
    stored = manifest.read(ws, 0, "dataset", 0)
    sets = {name: read_rows(stored.path(f"{name}.parquet")) for name in ("train", *evaluate.SETS)}
    manifest.manifest_path(ws, 0, "dataset", 0).unlink()
    for shard in load(ws.root, 0, "dataset").shards():
        made = []
        for name, rows in sets.items():
            made.append(shard.output(f"{name}.parquet"))
            write_rows(made[-1], [replace(row, **changes) if (name, row.id) == (of, id) else row for row in rows])  # type: ignore[arg-type]
        assert shard.commit(made, made_from={})


def samples(ws: Workspace) -> list[Path]:
    return [manifest.read(ws, 1, "sample", shard).path("samples.parquet") for shard in range(3)]


def test_a_row_that_is_too_long_stops_the_round_before_the_engine_starts(new_run: NewRun) -> None:
    ws = new_run("sample.max_model_len=800")
    long = with_a_long_row(ws)
    with pytest.raises(PromptError, match=rf"1 of 8 prompts .* than the 784 tokens .* row {long}: \d+ tokens"):
        sample.main(arguments(ws))
    assert not manifest.done_shards(ws, 1, "sample")
    (record,) = read_records(ws.stage_dir(1, "sample"))
    assert not record.engine and not record.loading, "the engine was started"


def test_a_row_that_is_dropped_is_counted_to_the_end_and_the_others_stay_as_they_are(new_run: NewRun) -> None:
    whole, ws = new_run(), new_run("sample.max_model_len=800", "sample.long_prompts=drop")
    with_a_long_row(ws)
    for run in (whole, ws):
        assert sample.main(arguments(run)) == 0
    drawn, all = ([one for path in samples(run) for one in read_samples(path)] for run in (ws, whole))
    assert [(one.sample_id, one.group, one.seed, one.prompt_token_ids) for one in drawn] == [
        (one.sample_id, one.group, one.seed, one.prompt_token_ids) for one in all if one.group != LONG
    ]
    metrics = [manifest.read(ws, 1, "sample", shard).metrics for shard in range(3)]
    assert [(one["prompts"], one["dropped"]) for one in metrics] == [(3, 0), (2, 1), (2, 0)]
    with listener_thread(ws):
        assert grade.main(arguments(ws)) == 0
    graded = [manifest.read(ws, 1, "grade", shard).path("graded.parquet") for shard in range(3)]
    counts = store.read(graded, parts=("accuracy", "format", "length"), group_size=4, groups=8).counts
    assert (counts.samples, counts.groups, counts.dropped_groups, counts.short_groups) == (28, 8, 1, 0)


def test_evaluation_checks_its_prompts_too_and_counts_what_it_drops(new_run: NewRun) -> None:
    ws, dropping = new_run("sample.max_model_len=800"), new_run("sample.max_model_len=800", "sample.long_prompts=drop")
    for run in (ws, dropping):
        long = read_rows(manifest.read(run, 0, "dataset", 0).path("validation.parquet"))[2].id
        change_row(run, "validation", long, speaker_problem="ring " * 1000)
    with listener_thread(dropping, stage="evaluate.listener", round=0):
        assert evaluate.main(arguments(dropping, 0)) == 0
    metrics = manifest.read(dropping, 0, "evaluate", 0).metrics
    assert (metrics["n_new_views"], metrics["n_validation"]) == (7, 5)
    assert (metrics["dropped_new_views"], metrics["dropped_validation"]) == (0, 1)
    with pytest.raises(PromptError, match=rf"1 of 13 prompts .* row validation/{long}: \d+ tokens"):
        evaluate.main(arguments(ws, 0))


@pytest.mark.parametrize(
    ("kept", "error"), [(8, "1 of 13 prompts cannot be sampled from. row {}: "), (-200, "row {}, image broken.png: ")]
)
def test_a_picture_that_an_evaluation_cannot_read_is_named_with_its_row(new_run: NewRun, kept: int, error: str) -> None:
    ws = new_run()
    row = read_rows(manifest.read(ws, 0, "dataset", 0).path("validation.parquet"))[2]
    root = image_root(ws, None)
    root.joinpath("broken.png").write_bytes(root.joinpath(row.image).read_bytes()[:kept])  # with its header, or without
    change_row(ws, "validation", row.id, image="broken.png")
    with pytest.raises(ValueError, match=error.format(f"validation/{row.id}")):
        evaluate.main(arguments(ws, 0))
