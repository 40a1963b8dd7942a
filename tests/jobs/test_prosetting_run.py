"""ProSetting as a whole, on the tiny solver: two rounds of configs/tiny/prosetting.yaml, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.run import manifest
from hpc_rl.teachers import sums
from jobs.prosetting import evaluate, questions
from tests.forked import Forked
from tests.jobs.solving import open_prosetting
from tools import tiny_sums

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/tiny/prosetting.yaml"
ROUNDS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds in one process: one that collects and one that trains."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = (f"run.rounds={ROUNDS}", "sample.engine=transformers")
    where = ("--workspace", str(folder / "run"), "--executor", "debug")
    launch = (str(REPOSITORY / CONFIG), *where, *(part for one in settings for part in ("--set", one)))
    assert Forked("hpc_rl.launch", launch, folder / "said").wait() == 0, (folder / "said").read_text()[-6000:]
    return Run.load(folder / "run")


def made(run: Run, round: int, stage: str) -> list[manifest.StoredManifest]:
    shards = run.graph[StageId(round, stage)].shards
    return [manifest.read(run.ws, round, stage, shard) for shard in range(shards)]


def rows(run: Run, round: int, stage: str, name: str) -> list[dict[str, Any]]:
    return [row for one in made(run, round, stage) for row in pq.read_table(one.path(name)).to_pylist()]


def test_it_learns_once_it_trains_s7(run: Run) -> None:
    """S7: rounds before `train_start_round` only collect; held-out questions are asked before and after training."""
    assert not {StageId(1, "train"), StageId(1, "evaluate")} & set(run.graph.by_id)
    before, after = (made(run, round, "evaluate")[0].metrics for round in (0, ROUNDS))
    assert before["n_held_out"] == after["n_held_out"] == 400
    assert before["accuracy"] < 0.3 and after["accuracy"] > 0.7, (before, after)


def test_each_round_has_k_attempts_at_each_question_of_its_pool_s1(run: Run) -> None:
    """S1, S8: by the solver as it was at the round's start."""
    (trained,) = made(run, ROUNDS, "train")
    for round in range(1, ROUNDS + 1):
        pool = [one["question_id"] for one in rows(run, round - 1, "pool", "questions.parquet")]
        samples = rows(run, round, "collect", "samples.parquet")
        found = [(sample["row_id"], sample["group"], sample["attempt"]) for sample in samples]
        assert found == [(id, place, attempt) for place, id in enumerate(pool) for attempt in range(8)]
        assert {sample["weights_hash"] for sample in samples} == {trained.made_from["weights"]}


def test_wrong_references_are_found_and_leave_the_pool_s4(run: Run) -> None:
    """S4: no attempt solves these questions, so they are checked; they are in no later pool, and those that are right
    and too hard are."""
    broken = {row["question_id"]: row["suggested_answer"] for row in rows(run, 1, "grade", "broken.parquet")}
    first, second = ({one["question_id"]: one for one in rows(run, r, "pool", "questions.parquet")} for r in (0, 1))
    wrong = {
        id: sums.answer(*terms)
        for id, one in first.items()
        if (terms := sums.parse(one["question"])) and one["answer"] != sums.answer(*terms)
    }
    assert broken == wrong and len(wrong) == 3
    too_hard = {row["question_id"] for row in rows(run, 1, "grade", "results.parquet") if row["zone"] == "too_hard"}
    assert too_hard & set(second) == too_hard - set(broken)


def test_no_held_out_question_is_asked_or_trained_on(run: Run) -> None:
    held_out = {one["question"] for one in rows(run, 0, "pool", "held_out.parquet")}
    for round in range(ROUNDS + 1):
        assert held_out.isdisjoint({one["question"] for one in rows(run, round, "pool", "questions.parquet")})
    for round in range(1, ROUNDS + 1):
        for name in ("train.parquet", "validation.parquet"):
            pairs = rows(run, round, "dpo_data", name)
            assert pairs and held_out.isdisjoint({pair["prompt"][-1]["content"] for pair in pairs})


def test_curves_of_the_run_have_a_point_for_each_round_s18(run: Run) -> None:
    """S18: mean reward, zones, diversity, and what came of them."""
    events = EventAccumulator(str(run.ws.tb_dir / "run")).Reload()
    assert [point.step for point in events.Scalars("evaluate/accuracy")] == [0, ROUNDS]
    pool = ("pool/zone_mastered", "pool/diversity", "pool/questions")
    for name in ("grade/mean_reward", *pool, "sampling/acceptance/solver"):  # of rounds that only collect, too
        points = {point.step: point.value for point in events.Scalars(name)}
        assert set(points) >= set(range(1, ROUNDS + 1)), name
    (pool,) = made(run, 1, "pool")
    points = {point.step: point.value for point in events.Scalars("pool/questions")}
    assert points[1] == pool.metrics["questions"] == len(rows(run, 1, "pool", "questions.parquet"))
    graded = [row["reward"] for row in rows(run, 2, "grade", "graded.parquet") if row["reward"] is not None]
    rewards = {point.step: point.value for point in events.Scalars("grade/mean_reward")}
    assert rewards[2] == pytest.approx(sum(graded) / len(graded), abs=1e-5)


def test_the_gpu_is_free_between_stages_as_each_is_a_process_s19() -> None:
    """S19: whatever a stage had on a GPU goes with its process."""
    command = [sys.executable, "-m", "hpc_rl.launch", CONFIG, "--dry-run", "--verbose", "--executor", "local"]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for stage in ("collect", "grade", "dpo_data", "train", "enhance", "pool", "evaluate"):
        started = [line for line in shown.splitlines() if "hpc_rl.cluster.entry" in line and f"-r02-{stage}-" in line]
        assert len(started) == 1, f"{stage}: {shown}"


def test_pass_at_1_is_the_mean_over_all_attempts(tmp_path: Path) -> None:
    """And pass@k the share of questions that one of them solves; both as the texts in the table say."""
    *held_out, last = (
        {"question": tiny_sums.question(one), "answer": tiny_sums.answer(one)} for one in tiny_sums.sums()[1][:4]
    )
    asked = [*held_out, last | {"answer": "four"}]
    (tmp_path / "held_out.json").write_text(json.dumps(asked))
    ws = open_prosetting(
        tmp_path / "run", f"questions.held_out_file={tmp_path}/held_out.json", "evaluate.samples_per_question=40",
        "evaluate.temperature=1.0", "evaluate.batch_size=7",
    )  # fmt: skip
    body = ("--workspace", str(ws.root), "--round", "0")
    assert questions.main([*body, "--stage", "pool"]) == evaluate.main([*body]) == 0
    done = manifest.read(ws, 0, "evaluate", 0)
    table = pq.read_table(done.path("evaluation.parquet")).to_pylist()
    assert [(row["question_id"], row["attempt"]) for row in table] == [
        (f"h{number:06d}", attempt) for number in range(1, 5) for attempt in range(40)
    ]
    assert len({row["text"] for row in table[:40]}) > 1, "attempts have seeds of their own"
    right = [row["text"] == asked[place // 40]["answer"] for place, row in enumerate(table)]
    assert [row["right"] for row in table] == right
    assert done.metrics["accuracy"] == pytest.approx(sum(right) / 160, abs=1e-4) and 0 < sum(right) < 120
    assert done.metrics["pass_at_k"] == sum(any(right[i : i + 40]) for i in range(0, 160, 40)) / 4 <= 0.75
    assert done.metrics["truncated"] == sum(row["finish_reason"] == "length" for row in table)
