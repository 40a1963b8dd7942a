"""`report`: from the files that a run leaves in its workspace, whatever became of it; text and JSON (S11, S18)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpc_rl import config as configs
from hpc_rl import report as command
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.recipes.columns import Column, Folding
from hpc_rl.reporting import clock
from hpc_rl.reporting.data import Folder
from hpc_rl.reporting.gather import gather
from hpc_rl.reporting.storage import folders
from hpc_rl.reporting.text import text
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.manifest import Manifest
from hpc_rl.sampling.record import Recorder
from hpc_rl.sampling.tally import Tally
from tests.full_disk import full_disk
from tests.waiting import PATIENCE_S

NOOP = source_root() / "benchmarks" / "noop.yaml"
QUESTIONS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
SOLVER = """
recipe: prosetting
run: {{name: solver, rounds: 3}}
cluster: {{executor: local}}
solver: {{path: models/none}}
questions: {{file: {file}}}
sample: {{shards: 2}}
train_start_round: 2
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two rounds, each with a `sample` stage of four shards."""
    return open_run(configs.load(NOOP, ["run.rounds=2"], {}, tmp_path / "run", cwd=tmp_path), NOOP)


@pytest.fixture
def solver(tmp_path: Path) -> Run:
    """A run of progressive solver training: three rounds, two shards, training from round 2 on."""
    (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS))
    file = tmp_path / "solver.yaml"
    file.write_text(SOLVER.format(file=tmp_path / "questions.json"))
    return open_run(configs.load(file, [], {}, tmp_path / "solver", cwd=tmp_path), file)


def report(run: Run) -> str:
    command = [sys.executable, "-m", "hpc_rl.report", str(run.ws.root)]
    done = subprocess.run(command, cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def as_json(run: Run, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert command.main([str(run.ws.root), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def page(run: Run) -> str:
    return " ".join(text(gather(run)).split())


def done(
    run: Run, round: int, stage: str, shard: int = 0, made_from: Mapping[str, Any] | None = None, **metrics: Any
) -> None:
    assert manifest.write(run.ws, Manifest(round, stage, shard, (), made_from=made_from or {}, metrics=metrics))


def submitted(
    run: Run, round: int, stage: str, at: float, number: int = 1, after: tuple[str, ...] = (), executor: str = "local"
) -> str:
    """A submission in the ledger, at a second of our choice."""
    name = f"{stage}-r{round}-a{number}"
    lines = [
        {"event": "intent", "time": at, "name": name, "round": round, "stage": stage, "number": number,
         "executor": executor, "depends_on": list(after)},
        {"event": "submitted", "time": at, "name": name, "job_ids": [f"job-{name}"]},
    ]  # fmt: skip
    with run.ws.ledger_path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return name


def ended(run: Run, round: int, stage: str, name: str, began: float, ended: float, **more: Any) -> EndRecord:
    """A process of a submission that used half of its time on the CPU and two GPUs."""
    end = EndRecord(name, f"job-{name}", 0, 0, "node1", "done", 0, "", f"logs/{name}.out", began, ended,
                    (ended - began) / 2, 2 * (ended - began), 3 * 2**20)  # fmt: skip
    end = replace(end, **more)
    path = run.ws.attempts_dir(round, stage) / f"{name}.end-{end.job_id}-{end.restart}-{ended}.json"
    atomic.write_json(path, asdict(end))
    return end


# sampling


def publish(run: Run, shard: int, task: str, tokens: int) -> None:
    by_role = Tally({"speaker": {4: 1, 6: 1}}, {"speaker": 8}, {"speaker": 0}).to_plain()
    numbers = {"task": task, "prompts": 2, "dropped": 0, "samples": 10, "tokens": tokens, "cut_off": 0}
    done(run, 1, "sample", shard, **numbers, by_role=by_role)


def test_rounds_that_nobody_sampled_have_no_section(run: Run) -> None:
    assert "sample:" not in report(run)


def test_a_round_is_shown_while_it_is_sampled_and_afterwards(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.ws.stage_dir(1, "sample")
    monkeypatch.setenv("HPC_RL_ATTEMPT", "noop-r01-sample-a1-abc")
    monkeypatch.setenv("HPC_RL_JOB_ID", "41_0")
    with Recorder(folder, "quick", gpus=1.0) as task:
        task.opened({"engine": "transformers", "asked": "auto"}, {"engine": 2.0})
        task.enter("sampling")
        for _ in range(30):
            task.drew(tokens=10, prompt_tokens=5)
        for shard in range(3):
            publish(run, shard, "quick", 100)
            task.published(100)
        shown = report(run)
        assert "round 1 sample: 1 task (1 running)" in shown
        assert "30 samples of 6 prompts, 300 tokens" in shown
        assert "round 2 sample" not in shown
    monkeypatch.setenv("HPC_RL_JOB_ID", "41_1")
    killed = Recorder(folder, "killed", gpus=1.0)
    killed.enter("sampling")
    killed.drew(tokens=150, prompt_tokens=5)
    publish(run, 3, "killed", 100)
    atomic.write_json(killed.path, asdict(killed.record()))  # the last that is heard of it
    record = killed.record()
    try:
        end = EndRecord("noop-r01-sample-a1-abc", "41_1", 0, 0, record.host, "killed", -9, "", "", record.started - 1.0,
                        record.updated + 9.0, 1.0, 10.0 + record.updated - record.started)  # fmt: skip
        full = replace(end, job_id="41_2", outcome="out of memory", error="CUDA out of memory", log="logs/41_2-0.out")
        for one in (end, full):
            atomic.write_json(run.ws.attempts_dir(1, "sample") / f"{end.name}.end-{one.job_id}-0-1.json", asdict(one))
        shown = report(run)
    finally:
        killed.close()
    assert "round 1 sample: 3 tasks (1 killed, 1 out of memory)" in shown
    assert "trouble 1 out of memory; it said: CUDA out of memory (log: logs/41_2-0.out)" in shown
    assert "40 samples of 8 prompts, 400 tokens; 50 tokens lost" in shown
    assert "speaker 32 of 40 accepted (80.0 %); prompts by tries 4: 4, 6: 4; 0 of 8 prompts exhausted" in shown
    assert "GPU seconds for each accepted sample" in shown
    assert "engine transformers, asked auto" in shown


# what a recipe declares


def test_a_number_of_a_round_is_its_shards_sum_mean_or_maximum() -> None:
    shards: list[dict[str, Any]] = [
        {"n": 2, "x": 0.5, "weight": 3, "other": 1},
        {"n": 5, "x": 1.0, "weight": 1, "other": 3},
        {"n": True, "x": None, "weight": 9},
    ]

    def folded(**settings: Any) -> Any:
        folding = Folding(Column("title", "stage", **settings))
        for metrics in shards:
            folding.add(metrics)
        return folding.value

    assert folded(metric="n") == 7, "True is no number"
    assert folded(metric="n", fold="max") == 5
    assert folded(metric="x", fold="mean") == pytest.approx(0.75)
    assert folded(metric="x", fold="mean", weight=("weight",)) == pytest.approx(2.5 / 4)
    assert folded(metric="x", fold="mean", weight=("weight", "other")) == pytest.approx(6 / 8)
    assert folded(metric="x", fold="mean", weight=("absent",)) is None
    assert folded(metric="absent") is None


def a_round(run: Run, round: int, right: int) -> None:
    """The manifests of a round: of 12 attempts in two shards so many are right, all of them in the second one."""
    for shard in range(2):
        done(run, round, "collect", shard)
        ok = right if shard else 0
        done(run, round, "grade", shard, samples=8 if shard else 5, right=ok, wrong=(8 if shard else 4) - ok,
             left_out=0 if shard else 1, mean_reward=ok / 8 if shard else 0.0, graded_by_rule=3, graded_by_teacher=1,
             zone_mastered=shard, zone_learning=0, zone_too_hard=1 - shard, zone_ungraded=0)  # fmt: skip
        done(run, round, "enhance", shard, dropped_bad_reply=shard)
    done(run, round, "dpo_data", pairs_train=10 * round, pairs_validation=round, pairs_new=10)
    done(run, round, "pool", questions=4 + round, enhanced=1, broken=round % 2, diversity=0.25)


def test_s18_zones_rewards_pairs_diversity_and_losses_of_each_round(
    solver: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    done(solver, 0, "pool", questions=4, diversity=0.5)
    done(solver, 0, "evaluate", accuracy=0.25, n_held_out=40, n_attempts=40)
    a_round(solver, 1, right=3)
    a_round(solver, 2, right=8)
    done(solver, 2, "train", steps=6, first_loss=0.69, last_loss=0.31, mean_loss=0.5, mean_grad_norm=1.5,
         validation_loss=0.4, memory_notches=1, per_device_batch_size=4, gradient_accumulation_steps=2,
         mean_tokens_per_s=float("nan"))  # fmt: skip
    done(solver, 2, "evaluate", accuracy=0.75, n_held_out=40, n_attempts=40)
    found = as_json(solver, capsys)
    held_out, attempts, questions, teachers, pairs = found["tables"]
    assert held_out["about"] == "40 questions, 40 attempts"
    assert held_out["rounds"] == [{"round": 0, "pass@1": 0.25}, {"round": 2, "pass@1": 0.75}]
    assert [column["title"] for column in held_out["columns"]] == ["pass@1"], "what no round has is not shown"
    first = attempts["rounds"][0]
    assert (first["attempts"], first["right"], first["wrong"], first["left out"]) == (13, 3, 9, 1)
    assert first["reward"] == pytest.approx(3 / 12), "over what was graded, not over shards"
    assert (first["by rule"], first["by teacher"]) == (6, 2)
    (trend,) = attempts["trends"]
    assert (trend["title"], trend["first_round"], trend["last_round"]) == ("reward", 1, 2)
    assert (trend["first"], trend["last"]) == (pytest.approx(3 / 12), pytest.approx(8 / 12))
    assert questions["rounds"][0] == {"round": 0, "next pool": 4, "diversity": 0.5}
    of_round_1 = {"mastered": 1, "learning": 0, "too hard": 1, "ungraded": 0, "enhanced": 1, "broken": 1}
    assert questions["rounds"][1] == {"round": 1, **of_round_1, "next pool": 5, "diversity": 0.25}
    assert teachers["rounds"] == [{"round": 1, "bad replies": 1}, {"round": 2, "bad replies": 1}]
    assert pairs["rounds"][1] == {"round": 2, "new": 10, "train": 20, "validation": 2, "val. loss": 0.4}
    (training,) = found["trainings"]
    assert (training["first_loss"], training["last_loss"], training["mean_grad_norm"]) == (0.69, 0.31, 1.5)
    assert training["tokens_per_s"] is None, "NaN is no JSON"
    assert (found["rounds_done"], found["rounds_planned"], found["status"]) == (2, 3, "idle")

    shown = page(solver)
    assert "held-out questions: 40 questions, 40 attempts round pass@1 0 0.250 2 0.750" in shown
    assert "trend: pass@1 0.250 in round 0 → 0.750 in round 2" in shown
    assert "trend: reward 0.250 in round 1 → 0.667 in round 2" in shown
    assert "2 train 6 0.690 0.310 0.500 1.500" in shown
    assert "round 2 train: after running out of memory once, per_device_batch_size 4" in shown
    assert "2 of 3 rounds" in shown


def test_a_stage_that_the_run_went_on_without_is_said(solver: Run, capsys: pytest.CaptureFixture[str]) -> None:
    done(solver, 2, "train", made_from={"given_up": "out of memory with settings that go no lower", "trained_round": 0})
    done(solver, 3, "train", made_from={"nothing_to_learn": "no pairs", "trained_round": 0}, steps=0)
    found = as_json(solver, capsys)
    assert found["went_without"] == [
        {"round": 2, "stage": "train", "how": "given up", "reason": "out of memory with settings that go no lower"},
        {"round": 3, "stage": "train", "how": "nothing to learn", "reason": "no pairs"},
    ]
    assert found["trainings"] == []
    assert "round 3 train: nothing to learn, and the run went on: no pairs" in page(solver)
    assert "round 2 train: given up, and the run went on: out of memory" in page(solver)


# S11: duration, errors, status


def test_s11_how_long_it_took_how_long_it_stood_still_and_how_long_jobs_waited(run: Run) -> None:
    sample = submitted(run, 1, "sample", 1000.0)
    grade = submitted(run, 1, "grade", 1001.0, after=(sample,))
    ended(run, 1, "sample", sample, 1010.0, 1050.0)
    ended(run, 1, "sample", sample, 1030.0, 1060.0, job_id="another element")
    ended(run, 1, "grade", grade, 1065.0, 1100.0)
    with run.ws.ledger_path.open("a") as file:
        for event, at in (("paused", 1070.0), ("stopped", 1075.0), ("resumed", 1090.0), ("paused", 1095.0)):
            file.write(json.dumps({"event": event, "time": at, "why": "the user wished it"}) + "\n")
    times = gather(run).times
    assert (times.began, times.ended, times.wall_s) == (1000.0, 1100.0, 100.0)
    assert times.stood_still_s == 20 + 5
    assert times.waited_s == (1010 - 1000) + (1065 - 1060), "grade had to wait for sample's last process"
    assert "paused: the user wished it" in page(run)
    assert "100 s: " in page(run) and "25 s of that it was paused or stopped" in page(run)


def test_a_job_waits_for_the_start_of_its_service_and_not_for_its_end(solver: Run) -> None:
    service = submitted(solver, 1, "enhance.teacher", 10.0)
    consumer = submitted(solver, 1, "enhance", 10.0, after=(service,))
    ends = [
        ended(solver, 1, "enhance.teacher", service, 30.0, 90.0),
        ended(solver, 1, "enhance", consumer, 35.0, 80.0),
    ]
    assert StageId(1, "enhance.teacher") in solver.graph[StageId(1, "enhance")].uses
    assert clock.waited_s(solver, Ledger(solver.ws).history(), ends) == 5.0


def test_what_failed_how_often_and_with_which_last_words(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (submitted(run, 1, "sample", 10.0 + number, number) for number in (1, 2))
    ended(run, 1, "sample", first, 20.0, 30.0, outcome="error", error="KeyError: 'early'", log="logs/1.out")
    ended(run, 1, "sample", first, 20.0, 40.0, outcome="error", error="KeyError: 'late'", log="logs/2.out", job_id="2")
    ended(run, 1, "sample", second, 50.0, 60.0, outcome="left", error="told to leave")
    submitted(run, 1, "grade", 70.0)
    submitted(run, 1, "score", 70.0, executor="debug")
    found = as_json(run, capsys)
    sample, grade = found["troubles"]
    assert (sample["stage"], sample["attempts"], sample["ends"]) == ("sample", 2, {"error": 2, "left": 1})
    assert (sample["last_error"], sample["log"]) == ("KeyError: 'late'", "logs/2.out")
    assert (grade["stage"], grade["ends"]) == ("grade", {"lost": 1}), "nothing is queued of it, and it left no word"
    assert "round 1 sample: 2 attempts; ended otherwise than well: 2 error, 1 left" in page(run)
    assert "the last one: KeyError: 'late' (log: logs/2.out)" in page(run)


def test_jobs_that_left_when_all_was_done_are_no_trouble(run: Run) -> None:
    first = submitted(run, 2, "train", 0.0)
    ended(run, 2, "train", first, 10.0, 20.0, outcome="left", error="told to leave")
    assert [one.ends for one in gather(run).troubles] == [{"left": 1}], "the work is not done"
    done(run, 2, "train")
    assert gather(run).troubles == ()
    last = submitted(run, 2, "train", 30.0, 2)
    ended(run, 2, "train", last, 40.0, 50.0, outcome="left", error="told to leave")
    assert [(one.attempts, one.ends) for one in gather(run).troubles] == [(2, {"left": 1})], "the first left early"


def test_cost_is_summed_over_all_attempts_and_memory_is_that_of_the_largest_process(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    name = submitted(run, 1, "sample", 10.0)
    ended(run, 1, "sample", name, 20.0, 30.0, outcome="killed", peak_memory_bytes=None)
    ended(run, 1, "sample", name, 40.0, 60.0, peak_memory_bytes=5 * 2**30)
    ended(run, 2, "sample", submitted(run, 2, "sample", 70.0), 3600.0, 5400.0)
    found = as_json(run, capsys)
    assert found["costs"] == [
        {"stage": "sample", "processes": 3, "wall_s": 1830.0, "cpu_s": 915.0, "gpu_s": 3660.0,
         "peak_memory_bytes": 5 * 2**30}
    ]  # fmt: skip
    assert found["gpu_hours"] == pytest.approx(3660 / 3600)
    assert "sample 30 min 15 min 61 min 3 5.0 GiB" in page(run)
    assert "3 processes, 1.02 GPU hours" in page(run)


def test_storage_counts_a_file_once_whatever_its_names(tmp_path: Path) -> None:
    for name, size in (("rounds/round_01/a", 100), ("rounds/b", 20), ("code/c", 7), ("loose", 3)):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    os.link(tmp_path / "run/rounds/b", tmp_path / "run/rounds/round_01/b-again")
    (tmp_path / "run/link").symlink_to(tmp_path)
    (tmp_path / "outside").write_bytes(b"x" * 1000)
    found = {folder.name: folder for folder in folders(tmp_path / "run", pytest.fail)}
    assert found["rounds"] == Folder("rounds", 3 - 1, 120)
    assert found["code"] == Folder("code", 1, 7)
    assert found["."] == Folder(".", 1, 3), "a link's folder is somebody else's"


def test_nothing_that_a_recipe_or_a_job_uses_imports_the_report_or_the_doctor() -> None:
    """docs/architecture.md: imports go one way."""
    above = ("hpc_rl.reporting", "hpc_rl.health", "hpc_rl.doctor")
    for file in (source_root() / "hpc_rl").glob("*/**/*.py"):
        if file.relative_to(source_root() / "hpc_rl").parts[0] not in ("reporting", "health"):
            nodes = ast.walk(ast.parse(file.read_text()))
            imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
            assert not [name for name in imported if name.startswith(above)], file


def test_a_run_of_which_nothing_has_happened_yet_has_a_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(run, capsys)
    assert (found["status"], found["rounds_done"], found["times"]["began"]) == ("idle", 0, None)
    assert found["tables"] == found["trainings"] == found["costs"] == found["troubles"] == found["damaged"] == []


def test_what_is_damaged_is_named_and_the_rest_is_reported(solver: Run, capsys: pytest.CaptureFixture[str]) -> None:
    a_round(solver, 1, right=3)
    name = submitted(solver, 1, "grade", 10.0)
    ended(solver, 1, "grade", name, 20.0, 30.0)
    broken = {
        manifest.manifest_path(solver.ws, 1, "grade", 0): "{",
        solver.ws.attempts_dir(1, "grade") / f"{name}.end-x-0-1.json": '{"name": "x"}',
        solver.ws.stage_dir(1, "collect") / "tasks" / "x.json": "[]",
    }
    for path, content in broken.items():
        atomic.write_text(path, content)
    with solver.ws.ledger_path.open("a") as file:
        file.write('{"event": "inte')
    found = as_json(solver, capsys, code=1)
    assert len(found["damaged"]) == 4
    for path in (*broken, solver.ws.ledger_path):
        assert any(str(path) in line for line in found["damaged"]), path
    assert found["tables"][0]["rounds"][0]["right"] == 3, "the other shard's"
    assert found["costs"][0]["wall_s"] == 10.0
    assert "what could not be read, and is not in these numbers" in page(solver)


def test_s11_the_last_report_lies_in_the_workspace_as_text_and_as_json(run: Run) -> None:
    for round in (1, 2):
        for stage in run.graph.of_round(round):
            for shard in range(stage.shards if stage.has_work else 0):
                done(run, round, stage.name, shard)
    said = command.write(run)
    assert "finished" in said and "2 of 2 rounds" in said
    assert (run.ws.root / "report.txt").read_text() == said + "\n"
    assert json.loads((run.ws.root / "report.json").read_text())["status"] == "finished"


def test_a_full_disk_does_not_take_the_report_away(run: Run) -> None:
    with full_disk():
        said = command.write(run)
    assert "0 of 2 rounds" in said
    assert "report.json and report.txt could not be written" in said
