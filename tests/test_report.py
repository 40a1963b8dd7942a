"""`report` on sampling: from the files that tasks leave in a workspace, whatever became of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.manifest import Manifest
from hpc_rl.sampling.record import Recorder
from hpc_rl.sampling.tally import Tally
from tests.waiting import PATIENCE_S

NOOP = source_root() / "benchmarks" / "noop.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of two rounds, each with a `sample` stage of four shards."""
    return open_run(configs.load(NOOP, ["run.rounds=2"], {}, tmp_path / "run", cwd=tmp_path), NOOP)


def report(run: Run) -> str:
    command = [sys.executable, "-m", "hpc_rl.report", str(run.ws.root)]
    done = subprocess.run(command, cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def publish(run: Run, shard: int, task: str, tokens: int) -> None:
    by_role = Tally({"speaker": {4: 1, 6: 1}}, {"speaker": 8}, {"speaker": 0}).to_plain()
    numbers = {"task": task, "prompts": 2, "dropped": 0, "samples": 10, "tokens": tokens, "cut_off": 0}
    assert manifest.write(run.ws, Manifest(1, "sample", shard, (), metrics={**numbers, "by_role": by_role}))


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


def test_a_damaged_record_is_named(run: Run) -> None:
    atomic.write_text(run.ws.stage_dir(1, "sample") / "tasks" / "x.json", "{")
    command = [sys.executable, "-m", "hpc_rl.report", str(run.ws.root)]
    done = subprocess.run(command, cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2 and "tasks/x.json is not valid JSON" in done.stderr and "Traceback" not in done.stderr
