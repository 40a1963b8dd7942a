"""Sampling, serving, grading and evaluating as job bodies: what they write, and what a kill changes (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hpc_rl.grading.game import LewisGraded
from hpc_rl.grading.lewis import parse
from hpc_rl.grading.samples import read_graded, read_samples
from hpc_rl.run import manifest
from hpc_rl.run.seeds import derive
from hpc_rl.run.workspace import Workspace
from jobs import sample
from jobs.lewis import evaluate, grade
from tests.forked import Forked
from tests.jobs.listening import arguments, listener, listener_thread

REPOSITORY = Path(__file__).resolve().parents[2]
NewRun = Callable[..., Workspace]
SHARDS = 3  # 8 prompts in shards of 3


def samples_of(ws: Workspace) -> list[Any]:
    paths = [manifest.read(ws, 1, "sample", shard).path("samples.parquet") for shard in range(SHARDS)]
    return [s for path in paths for s in read_samples(path)]


def graded_of(ws: Workspace) -> list[Any]:
    paths = [manifest.read(ws, 1, "grade", shard).path("graded.parquet") for shard in range(SHARDS)]
    return [s for path in paths for s in read_graded(path, LewisGraded)]


@pytest.fixture
def sampled(new_run: NewRun) -> Workspace:
    ws = new_run()
    assert sample.main(arguments(ws)) == 0
    return ws


def test_a_round_has_g_samples_of_each_prompt_with_seeds_of_their_own(sampled: Workspace) -> None:
    drawn = samples_of(sampled)
    assert [(s.group, s.attempt) for s in drawn] == [(group, attempt) for group in range(8) for attempt in range(4)]
    assert len({s.sample_id for s in drawn}) == 32 and len({s.row_id for s in drawn}) == 8
    assert len({s.weights_hash for s in drawn}) == 1
    for s in drawn:
        assert s.sample_id == f"r01-{s.row_id}-g{s.attempt}"
        assert s.seed == derive(0, 1, "speaker", s.row_id, s.attempt)
        assert len(s.token_ids) == len(s.logprobs) <= 16 and all(p <= 0 for p in s.logprobs)
    made = manifest.read(sampled, 1, "sample", 0)
    assert made.made_from["weights"] == drawn[0].weights_hash and made.metrics["samples"] == 12


def test_samples_are_the_same_whoever_draws_them_and_in_which_order(sampled: Workspace, new_run: NewRun) -> None:
    """One process that does all shards against one process per shard, the last shard first."""
    other = new_run()
    folder = other.stage_dir(1, "sample")
    for shard in reversed(range(SHARDS)):
        for done in range(SHARDS):  # only `shard` is free
            path = manifest.manifest_path(other, 1, "sample", done)
            if done != shard and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
        assert sample.main(arguments(other)) == 0
        for done in range(SHARDS):
            path = manifest.manifest_path(other, 1, "sample", done)
            if path.read_text() == "{}":
                path.unlink()
    for one, two in zip(samples_of(other), samples_of(sampled), strict=True):
        assert {**vars(one), "logprobs": ()} == {**vars(two), "logprobs": ()}
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)  # the last bits depend on the batch


def test_grading_asks_the_service_and_writes_parts_total_and_log(sampled: Workspace) -> None:
    with listener_thread(sampled):
        assert grade.main(arguments(sampled)) == 0
    graded = graded_of(sampled)
    assert [vars(g)[name] for g in graded for name in ("text", "token_ids", "seed")] == [
        vars(s)[name] for s in samples_of(sampled) for name in ("text", "token_ids", "seed")
    ]
    for g in graded:
        assert not g.left_out and g.reward == pytest.approx(g.reward_accuracy + g.reward_format + g.reward_length)
        assert len(g.yes_probabilities) == (3 if parse(g.text) else 0)
    made = manifest.read(sampled, 1, "grade", 0)
    assert made.metrics["samples"] == 12 and made.metrics["left_out"] == 0
    lines = [json.loads(line) for line in made.path("predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [g.sample_id for g in graded[:12]]
    assert {"time", "step", "prompt", "description", "yes_probabilities", "reward"} <= set(lines[0])


def test_rewards_are_the_same_when_the_listener_is_killed_while_it_grades(sampled: Workspace, new_run: NewRun) -> None:
    with listener_thread(sampled):
        assert grade.main(arguments(sampled)) == 0
    disturbed = new_run("services.listener.client.chunk_size=1", "services.listener.client.chunk_delay_s=0.1")
    assert sample.main(arguments(disturbed)) == 0
    with listener(disturbed, "1") as first:
        grading = Forked("jobs.lewis.grade", arguments(disturbed), disturbed.root / "grade.out")
        try:
            while not list(disturbed.stage_dir(1, "grade").glob("leases/*.lease.*")):
                assert grading.poll() is None
                time.sleep(0.02)
            time.sleep(0.5)
            first.kill()
            assert grading.poll() is None, "too quick to be disturbed"
            with listener(disturbed, "2"):
                assert grading.wait(90) == 0
        finally:
            grading.kill()
            grading.wait()
    for one, other in zip(graded_of(disturbed), graded_of(sampled), strict=True):
        assert (one.sample_id, one.reward, one.predicted_index) == (
            other.sample_id,
            other.reward,
            other.predicted_index,
        )
        assert one.yes_probabilities == pytest.approx(other.yes_probabilities, abs=1e-5)
        assert not one.left_out


def test_without_a_listener_grading_is_blocked_and_claims_nothing(new_run: NewRun) -> None:
    ws = new_run("services.listener.client.deadline_s=15")  # for the listener that comes; the one that does not, too
    assert sample.main(arguments(ws)) == 0
    assert grade.main(arguments(ws)) == 75
    assert not manifest.done_shards(ws, 1, "grade")
    with listener_thread(ws):
        assert grade.main(arguments(ws)) == 0
    assert len(graded_of(ws)) == 32


def test_a_game_whose_image_is_gone_is_left_out_and_counted(new_run: NewRun) -> None:
    ws = new_run("logging.debug=true")
    assert sample.main(arguments(ws)) == 0
    described = next(s for s in samples_of(ws) if parse(s.text))
    rows = {row["id"]: row for row in pq.read_table(ws.dataset_dir(0) / "train.parquet").to_pylist()}
    missing = ws.images_dir / rows[described.row_id]["ret_paths"][0]
    missing.unlink()
    with listener_thread(ws):
        assert grade.main(arguments(ws)) == 0
    graded = graded_of(ws)
    touched = [g for g in graded if parse(g.text) and str(missing).endswith(rows[g.row_id]["ret_paths"][0])]
    assert touched and all(g.left_out for g in graded if g.row_id == described.row_id and parse(g.text))
    for g in graded:
        if g.left_out:
            assert g.reward is None and g.reward_accuracy is None and g.predicted_index == -1
    counted = sum(manifest.read(ws, 1, "grade", shard).metrics["left_out"] for shard in range(SHARDS))
    assert counted == sum(g.left_out for g in graded) > 0
    (debug,) = ws.log_dir(1, "grade").glob("debug_speaker_0_*.txt")
    assert debug.read_text().count("---- r01-") == 32


def test_evaluation_counts_both_sets_and_shows_its_games(new_run: NewRun, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "lewis.json"
    ws = new_run("evaluate.batch_size=5", "evaluate.sample_texts_to_log=2", f"logging.prediction_log={log}")
    with listener_thread(ws, stage="evaluate.listener", round=0):
        assert evaluate.main(arguments(ws, 0)) == 0
    made = manifest.read(ws, 0, "evaluate", 0)
    metrics = made.metrics
    assert (metrics["n_new_views"], metrics["n_validation"]) == (7, 6)
    table = pq.read_table(made.path("evaluation.parquet")).to_pylist()
    for name, number in (("new_views", 7), ("validation", 6)):
        games = [game for game in table if game["set"] == name]
        assert len(games) == number
        correct = sum(game["predicted_index"] == game["label"] for game in games)
        assert metrics[f"accuracy_{name}"] == pytest.approx(correct / number, abs=1e-4)
        assert 0 <= metrics[f"true_{name}"] <= 1
    yes = [
        g["yes_probabilities"][g["label"]] > 0.5 for g in table if g["set"] == "validation" and g["yes_probabilities"]
    ]
    if yes:
        assert metrics["recognition_yes"] == pytest.approx(sum(yes) / len(yes), abs=1e-4)
    assert len(made.path("predictions.jsonl").read_text().splitlines()) == 13
    assert log.read_text() == made.path("predictions.jsonl").read_text()
    assert evaluation_events(ws) >= {"evaluate/accuracy_new_views", "new_views/0", "validation/1/text_summary"}


def test_wandb_that_is_asked_for_and_not_installed_is_an_error_before_any_work(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = new_run("logging.wandb.enabled=true")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="wandb is not installed"):
        evaluate.main(arguments(ws, 0))
    assert not manifest.done_shards(ws, 0, "evaluate")


def evaluation_events(ws: Workspace) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ws.tb_dir / "run"))
    events.Reload()
    tags = events.Tags()
    return {*tags["scalars"], *tags["images"], *tags["tensors"]}


def test_a_listener_that_is_told_to_leave_unpublishes_and_says_so(sampled: Workspace) -> None:
    with listener(sampled, "5") as server:
        (path,) = sampled.service_dir("listener").glob("job-5*.json")
        record = json.loads(path.read_text())
        assert record["state"] == "ready" and record["job_id"] == "5"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 143
    assert not list(sampled.service_dir("listener").glob("*.json"))


def test_a_listener_that_nobody_asks_leaves(new_run: NewRun) -> None:
    ws = new_run("services.listener.idle_timeout_s=0.2")
    assert sample.main(arguments(ws)) == 0
    with listener_thread(ws):
        pass


def test_job_bodies_are_light_until_they_pass_the_gate() -> None:
    code = (
        "import sys, jobs.sample, jobs.lewis.grade, jobs.lewis.evaluate, jobs.serve;"
        "from jobs.prosetting import questions, grade, dpo_data, enhance, pool, evaluate;"
        "heavy = {'torch', 'transformers', 'vllm', 'pyarrow', 'numpy', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )


def test_a_path_of_a_row_is_all_that_the_service_gets(sampled: Workspace) -> None:
    """Rows name images relative to the image root, so a run may be moved and the server keeps its root to itself."""
    rows = pq.read_table(sampled.dataset_dir(0) / "train.parquet").to_pylist()
    assert not any(Path(path).is_absolute() for row in rows for path in (row["image"], *row["ret_paths"]))
