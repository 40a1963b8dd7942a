"""A round that was sampled by a killed task and the one after it: what the report and TensorBoard say of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.cluster.entry import Spec
from hpc_rl.orchestrate import curves
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.sampled import summarise
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.sampling.lives import PARTS
from hpc_rl.sampling.record import read_records
from tests.jobs.conftest import REPOSITORY, NewRun
from tests.waiting import PATIENCE_S, wait_for

NAME = "tiny-r01-sample-a1-abc"


def start(ws: Workspace, job_id: str) -> subprocess.Popen[bytes]:
    """A task as an executor starts it: the entry process, and the body in it."""
    body = (sys.executable, "-m", "jobs.sample", "--workspace", str(ws.root), "--round", "1")
    spec = Spec(NAME, str(ws.root), 1, "sample", 24, "local", body, {}, gpus=1.0)
    environment = {
        **os.environ, "HPC_RL_JOB_ID": job_id, "HPC_RL_RESTART": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    command = [sys.executable, "-m", "hpc_rl.cluster.entry", str(spec.save())]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)


def body_of(entry: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{entry.pid}/task/{entry.pid}/children").read_text().split()[0])


@pytest.fixture
def killed_and_done(new_run: NewRun) -> Workspace:
    ws = new_run("sample.prompts_per_round=24", "sample.shard_size=1", "sample.max_tokens=48", "sample.max_num_seqs=4")
    with start(ws, "local1.1") as first:
        wait_for(lambda: manifest.done_shards(ws, 1, "sample"), "a shard", of=first)
        os.kill(body_of(first), signal.SIGKILL)
    assert 0 < len(manifest.done_shards(ws, 1, "sample")) < 24
    with start(ws, "local2.1") as second:
        assert second.wait(PATIENCE_S) == 0
    return ws


def test_its_time_adds_up_with_what_was_lost_and_curves_tell_of_it(killed_and_done: Workspace) -> None:
    ws = killed_and_done
    job = load(ws.root, 1, "sample")
    found = summarise(ws, job.stage)
    assert found is not None
    ends = [path for path in ws.attempts_dir(1, "sample").iterdir() if ".end-" in path.name]
    assert (len(ends), found.tasks, found.running, found.ends) == (2, 2, 0, {"killed": 1, "done": 1})
    assert found.task_s == pytest.approx(found.gpu_s, abs=1.0), "one GPU each, so the tasks' time is that of the GPUs"
    assert sum(found.share(part) for part in PARTS) == pytest.approx(1)
    assert found.seconds["start_up"] > 0 and found.seconds["unknown"] > 0, "a kill leaves up to 30 s unaccounted for"
    done = found.published
    assert (done.shards, done.prompts, done.accepted, done.samples) == (24, 24, 96, 96)
    assert (done.tally.tries, done.tally.exhausted) == ({"speaker": {4: 24}}, {"speaker": 0})
    whole = [record for record in read_records(job.folder) if record.ended is not None]
    assert [record.lost_tokens for record in whole] == [0]
    assert whole[0].kept_tokens == done.kept[whole[0].name] == whole[0].tokens
    assert {record.name for record in read_records(job.folder)} == set(done.kept)

    command = [sys.executable, "-m", "hpc_rl.report", str(ws.root)]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "round 1 sample: 2 tasks (1 killed)" in shown
    assert re.search(r"engine +transformers, asked transformers", shown)
    assert re.search(r"cost +[\d.]+ GPU seconds for each accepted sample", shown)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    playing = load(ws.root, 1, "evaluate")
    curves.write(playing, curves.of_sampling(playing, "sample"))
    events = EventAccumulator(str(ws.tb_dir / "run")).Reload()
    (accepted,) = events.Scalars("sampling/acceptance/speaker")
    assert (accepted.step, accepted.value) == (1, 1.0)
    assert sum(events.Scalars(f"sampling/share/{part}")[0].value for part in PARTS) == pytest.approx(1)
