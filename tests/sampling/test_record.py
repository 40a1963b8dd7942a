"""A task's record: phases that add up, a name of its own, and what a kill leaves behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rl.run import atomic
from hpc_rl.sampling.record import PHASES, Recorder, TaskRecord, read_records


def only(folder: Path) -> TaskRecord:
    (record,) = read_records(folder)
    return record


def test_the_seconds_of_all_phases_add_up_to_the_tasks_life(tmp_path: Path) -> None:
    began = time.time()
    with Recorder(tmp_path, "a") as task:
        time.sleep(0.02)
        assert task.enter("sampling") == "start_up"
        time.sleep(0.03)
        with task.during("judging"):
            time.sleep(0.02)
            with task.during("publishing"):
                time.sleep(0.01)
        time.sleep(0.03)
        task.enter("waiting")
        time.sleep(0.01)
    record, lived_s = only(tmp_path), time.time() - began
    assert set(record.seconds) == set(PHASES)
    slept = {"start_up": 0.02, "sampling": 0.06, "judging": 0.02, "publishing": 0.01, "waiting": 0.01}
    assert all(record.seconds[phase] >= slept[phase] for phase in PHASES)
    assert sum(record.seconds.values()) == pytest.approx(record.updated - record.started, abs=0.01)
    assert sum(record.seconds.values()) <= lived_s + 0.01
    assert record.ended is not None and record.ended >= record.updated - 0.01


def test_a_phase_within_another_ends_with_an_error_too(tmp_path: Path) -> None:
    with Recorder(tmp_path, "a") as task:
        task.enter("sampling")
        with pytest.raises(RuntimeError), task.during("judging"):
            raise RuntimeError
        assert task.enter("waiting") == "sampling"


def test_what_the_task_drew_kept_and_lost_is_counted_with_what_generates(tmp_path: Path) -> None:
    with Recorder(tmp_path, "a", gpus=2.0) as task:
        task.opened({"engine": "vllm", "max_num_seqs": 8, "from": Path("/models")}, {"weights": 1.25})
        for _ in range(3):
            task.drew(tokens=10, prompt_tokens=100)
        task.published(20)
        task.lost(10)
    record = only(tmp_path)
    assert (record.samples, record.tokens, record.prompt_tokens) == (3, 30, 300)
    assert (record.shards, record.kept_tokens, record.lost_shards, record.lost_tokens) == (1, 20, 1, 10)
    assert record.engine == {"engine": "vllm", "max_num_seqs": 8, "from": "/models"}
    assert (record.gpus, record.loading) == (2.0, {"weights": 1.25})


def test_a_batch_that_is_half_full_counts_half_and_start_up_does_not_count(tmp_path: Path) -> None:
    with Recorder(tmp_path, "a") as task:
        task.at_work_on(10, 10)
        time.sleep(0.05)
        task.enter("sampling")
        time.sleep(0.05)
        task.at_work_on(5, 10)
        time.sleep(0.05)
        task.at_work_on(1000, 10)  # those beyond the capacity wait in the engine
        time.sleep(0.05)
        task.at_work_on(0, 10)
        task.enter("waiting")
        time.sleep(0.05)
    record = only(tmp_path)
    busy_s = record.seconds["sampling"]
    assert 0.05 + 0.05 / 2 + 0.05 <= record.full_s <= busy_s - 0.05 / 2


def test_two_tasks_cannot_share_a_name(tmp_path: Path) -> None:
    with Recorder(tmp_path, "a") as first:
        first.drew(1, 1)
        with pytest.raises(ValueError, match="another task's record"):
            Recorder(tmp_path, "a")
        with Recorder(tmp_path, "b"):
            pass
    assert {record.name: record.samples for record in read_records(tmp_path)} == {"a": 1, "b": 0}


BODY = """
import signal, sys, time
from pathlib import Path
from hpc_rl.sampling.record import Recorder
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
with Recorder(Path(sys.argv[1]), "killed", every_s=0.05) as task:
    task.enter("sampling")
    task.drew(tokens=7, prompt_tokens=1)
    print("drawn", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_task_leaves_its_last_record_and_one_that_left_an_ended_one(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "HPC_RL_ATTEMPT": "run-r01-sample-a1", "HPC_RL_JOB_ID": "41_3", "HPC_RL_RESTART": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", BODY, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as body:
        assert body.stdout is not None and body.stdout.readline() == b"drawn\n"
        deadline = time.monotonic() + 120
        while only(tmp_path).tokens == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        body.send_signal(number)
    record = only(tmp_path)
    assert (record.tokens, record.attempt, record.job_id, record.restart) == (7, "run-r01-sample-a1", "41_3", 2)
    assert (record.ended is None) == (number == signal.SIGKILL)


def test_a_group_may_read_records_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Recorder(tmp_path, "a", every_s=0.01) as task:
            first = stat.S_IMODE(task.path.stat().st_mode)
            time.sleep(0.05)
        assert first == stat.S_IMODE(task.path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_record_that_cannot_be_written_does_not_end_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path, "a") as task:
        task.path.unlink()
        task.path.parent.rmdir()
        task.path.parent.write_text("a file where the folder was")
    assert "the report will know less of it" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "not valid JSON"), ('{"schema": 1}', "not a task's record"), ('{"schema": 99}', "newer hpc_rl")],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    atomic.write_text(tmp_path / "tasks" / "x.json", text)
    with pytest.raises(atomic.CorruptFile, match=rf"x\.json .*{complaint}"):
        list(read_records(tmp_path))


def test_a_stage_whose_tasks_left_no_records_has_none(tmp_path: Path) -> None:
    assert list(read_records(tmp_path)) == []
