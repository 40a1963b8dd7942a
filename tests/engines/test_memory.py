"""What an engine takes after it ran out of memory: how much less, how often, and where it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.cluster.entry import Spec
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.memory import (
    LEAST_SEQUENCES,
    count_notches,
    memory_gib,
    most_notches,
    notches_of,
    note_notches,
    plan,
    tell,
)
from hpc_rl.engines.pool import EnginePool
from hpc_rl.run import atomic
from hpc_rl.run.code import source_root
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.workspace import Workspace
from tests.waiting import wait_for

from .letters import OpenLetters

SAMPLE = SampleConfig(gpu_memory_utilization=0.8, min_gpu_memory_utilization=0.5, cpu_kv_cache_gib=8)
MEMORY_RAN_OUT = "raise MemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"


@dataclass(frozen=True)
class Ended:
    name: str
    started: float
    ended: float


def test_each_notch_takes_less_down_to_the_limits() -> None:
    found = [plan(SAMPLE, notches, memory_gib=64, least_kv_gib=1.5) for notches in range(6)]
    assert [p.gpu_memory_utilization for p in found] == [0.8, 0.7, 0.6, 0.5, 0.5, 0.5]
    assert [p.max_num_seqs for p in found] == [None, 128, 64, 32, 16, 16]
    assert [p.cpu_kv_cache_gib for p in found] == [8, 4, 2, 1.5, 1.5, 1.5]
    assert [p.notches for p in found] == list(range(6))


def test_sequences_go_down_from_what_the_config_says() -> None:
    def sequences(asked: int | None, engine: str = "vllm") -> list[int | None]:
        sample = SAMPLE.model_copy(update={"max_num_seqs": asked})
        return [plan(sample, notches, engine, memory_gib=64).max_num_seqs for notches in range(4)]

    assert sequences(100) == [100, 50, 25, 16]
    assert sequences(8) == [8, 8, 8, 8], "what is lower than the limit stays"
    assert sequences(None, "transformers") == [None, 16, 16, 16]


def test_a_cache_larger_than_the_machine_is_halved_from_what_the_machine_has() -> None:
    sample = SAMPLE.model_copy(update={"cpu_kv_cache_gib": 10_000.0})
    assert [plan(sample, n, memory_gib=20).cpu_kv_cache_gib for n in range(3)] == [10_000, 10, 5]


samples = st.builds(
    lambda share, least, sequences, gib: SAMPLE.model_copy(
        update={
            "gpu_memory_utilization": max(share, least),
            "min_gpu_memory_utilization": min(share, least),
            "max_num_seqs": sequences,
            "cpu_kv_cache_gib": gib,
        }
    ),
    st.integers(1, 100).map(lambda n: n / 100),
    st.integers(1, 100).map(lambda n: n / 100),
    st.none() | st.integers(1, 5000),
    st.floats(0.01, 1000),
)


@given(sample=samples, notches=st.integers(0, 20), memory=st.floats(0.1, 2000), least=st.floats(0, 4))
def test_a_further_notch_never_takes_more_and_none_goes_below_the_limits(
    sample: SampleConfig, notches: int, memory: float, least: float
) -> None:
    now, lower = (plan(sample, n, memory_gib=memory, least_kv_gib=least) for n in (notches, notches + 1))
    assert sample.least_gpu_memory_utilization <= lower.gpu_memory_utilization <= now.gpu_memory_utilization
    assert lower.cpu_kv_cache_gib <= now.cpu_kv_cache_gib
    assert lower.cpu_kv_cache_gib >= min(least, sample.cpu_kv_cache_gib)
    asked = sample.max_num_seqs or 256
    assert lower.max_num_seqs is not None and lower.max_num_seqs <= (now.max_num_seqs or asked)
    assert lower.max_num_seqs >= min(asked, LEAST_SEQUENCES)


@given(sample=samples, engine=st.sampled_from(["vllm", "transformers"]))
def test_the_last_notch_is_the_last_that_lowers_anything(sample: SampleConfig, engine: str) -> None:
    def numbers(notches: int) -> tuple[object, ...]:
        found = plan(sample, notches, engine, memory_gib=64)
        sequences = found.max_num_seqs or (32 if engine == "transformers" else 256)
        return (sequences,) if engine == "transformers" else (sequences, found.gpu_memory_utilization)

    last = most_notches(sample, engine, has_gpus=True)
    assert numbers(last) == numbers(last + 1) == numbers(last + 5)
    assert last == 0 or numbers(last) != numbers(last - 1)


def test_what_gets_lower_depends_on_the_engine() -> None:
    few = SAMPLE.model_copy(update={"max_num_seqs": 16})
    assert [most_notches(SAMPLE, engine, has_gpus=True) for engine in ("vllm", "auto", "transformers")] == [4, 4, 1]
    assert [most_notches(few, engine, has_gpus=True) for engine in ("vllm", "auto", "transformers")] == [3, 3, 0]
    assert [most_notches(few, engine, has_gpus=False) for engine in ("vllm", "transformers")] == [4, 0]


def test_tasks_of_one_array_that_fail_together_are_one_notch() -> None:
    together = [Ended("sample-a1", 10.0 + n, 30.0 + n) for n in range(8)]
    assert count_notches(together) == 1
    late = Ended("sample-a1", 60, 80)  # it started after the others had failed, so with less memory
    assert count_notches([*together, late]) == 2
    assert count_notches([*together, late, Ended("sample-a1", 59, 99)]) == 2, "that one had started before"
    assert count_notches([]) == 0


def test_another_submission_is_another_notch_whatever_the_clocks_of_its_nodes_say() -> None:
    ends = [Ended("sample-a1", 1000, 1030), Ended("sample-a2", 500, 520), Ended("sample-a2", 501, 522)]
    assert count_notches(ends) == 2


def job(ws: Workspace, name: str, body: str, round: int = 1, stage: str = "sample", job_id: str | None = None) -> None:
    """Run a job of a stage to its end, as an executor does."""
    made = Spec(name, str(ws.root), round, stage, 4, "local", (sys.executable, "-c", body), {})
    made.save()
    environment = {**os.environ, "HPC_RL_JOB_ID": job_id or f"{name}-job", "HPC_RL_RESTART": "0"}
    command = [sys.executable, "-m", "hpc_rl.cluster.entry", str(made.path)]
    subprocess.run(command, cwd=source_root(), env=environment, timeout=60, check=False, capture_output=True)


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    atomic.write_json(made.config_path, {})
    return made


def test_what_the_jobs_of_a_stage_met_says_how_much_less_the_next_one_takes(ws: Workspace) -> None:
    assert notches_of(ws, 1, "sample") == 0
    job(ws, "sample-a1", "raise KeyError('x')")
    assert notches_of(ws, 1, "sample") == 0
    job(ws, "sample-a2", MEMORY_RAN_OUT)
    assert notches_of(ws, 1, "sample") == 1
    job(ws, "sample-a3", MEMORY_RAN_OUT)
    assert notches_of(ws, 1, "sample") == 2
    assert notches_of(ws, 2, "sample") == 0, "as long as no engine has worked with less"
    note_notches(ws, 1, "sample", {"notches": 2})
    assert notches_of(ws, 2, "sample") == 2, "the next round begins with what this one has learnt"
    assert notches_of(ws, 1, "evaluate") == 0, "which has GPUs of its own"
    job(ws, "sample-r02-a1", MEMORY_RAN_OUT, round=2)
    assert (notches_of(ws, 1, "sample"), notches_of(ws, 2, "sample")) == (2, 3)


def test_a_task_that_comes_late_to_its_engine_takes_what_it_started_with_and_is_no_notch_more(ws: Workspace) -> None:
    looks = f"""if True:
        import time
        from pathlib import Path
        from hpc_rl.engines.memory import notches_of
        from hpc_rl.run.workspace import Workspace
        root = Path({str(ws.root)!r})
    """
    waits = """
        (root / "slow").touch()
        while not (root / "go").exists():
            time.sleep(0.02)
    """
    fails = f"""
        print("notches", notches_of(Workspace(root), 1, "sample"), flush=True)
        {MEMORY_RAN_OUT}
    """
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(job, ws, "sample-a1", looks + waits + fails, job_id="slow")
        wait_for((ws.root / "slow").exists, "the slow task has started")
        job(ws, "sample-a1", MEMORY_RAN_OUT)
        (ws.root / "go").touch()
        slow.result()
    assert notches_of(ws, 1, "sample") == 1
    job(ws, "sample-a1", looks + fails, job_id="later")
    assert notches_of(ws, 1, "sample") == 2
    said = {log.name.partition("-")[0]: log.read_text().splitlines()[0] for log in ws.log_dir(1, "sample").iterdir()}
    assert (said["slow"], said["later"]) == ("notches 0", "notches 1")


def test_what_workers_of_a_pool_took_counts_without_an_end_of_their_task(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_RL_ATTEMPT", "sample-a1")
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # workers import what the test does
    with EnginePool(OpenLetters(needs=2), 2, gpus=[(), ()]) as pool:
        pool.wait_until_all_are_ready()
        note_notches(ws, 1, "sample", pool.description)
        note_notches(ws, 1, "sample", pool.description)
    assert (notches_of(ws, 1, "sample"), notches_of(ws, 2, "sample")) == (2, 2)
    assert len(list(ws.attempts_dir(1, "sample").iterdir())) == 1
    job(ws, "sample-a1", MEMORY_RAN_OUT)
    assert notches_of(ws, 1, "sample") == 3, "that was with what they took"
    note_notches(ws, 1, "sample", {"notches": 0, "workers": [{"notches": 4, "given_up": "CUDA out of memory"}]})
    assert notches_of(ws, 2, "sample") == 2, "a worker that was given up did not work with it"


def test_a_task_whose_work_others_did_as_they_were_lowers_nothing_in_the_next_round(ws: Workspace) -> None:
    job(ws, "sample-a1", MEMORY_RAN_OUT)
    note_notches(ws, 1, "sample", {"engine": "vllm", "notches": 0})  # the other tasks of that array
    assert (notches_of(ws, 1, "sample"), notches_of(ws, 2, "sample")) == (1, 0)


def test_a_changed_config_or_a_resumed_run_begins_with_what_the_config_says(ws: Workspace) -> None:
    job(ws, "sample-a1", MEMORY_RAN_OUT)
    time.sleep(0.05)
    atomic.write_json(ws.config_path, {"sample": {"max_num_seqs": 32}})
    assert notches_of(ws, 1, "sample") == 0
    time.sleep(0.05)
    job(ws, "sample-a2", MEMORY_RAN_OUT)
    assert notches_of(ws, 1, "sample") == 1
    Ledger(ws).append("stopped", why="…")
    assert notches_of(ws, 1, "sample") == 1
    time.sleep(0.05)
    Ledger(ws).append("resumed")
    assert notches_of(ws, 1, "sample") == 0


def test_what_is_lowered_is_said_with_the_old_and_the_new_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell(plan(SAMPLE, 0, memory_gib=64), SAMPLE, ["gpu_memory_utilization", "max_num_seqs"])
        assert not caplog.records
        tell(plan(SAMPLE, 2, memory_gib=64), SAMPLE, ["gpu_memory_utilization", "max_num_seqs"])
    (said,) = caplog.messages
    assert said.startswith("after running out of memory 2 times: gpu_memory_utilization 0.6 instead of 0.8, ")
    assert said.endswith(", max_num_seqs 64 instead of null")


def test_the_machine_has_memory_and_no_more_than_it_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert 0 < memory_gib() <= total
