"""Workers that hang: they are found, killed and replaced, and whoever is only slow is left alone."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from pathlib import Path

import pytest

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate
from hpc_rl.engines.pool import PoisonedRequest, PoolFailed
from tests.waiting import wait_for

from .letters import OpenLetters
from .pools import SAMPLING, Open, alone, finish, guards_of, requests, submit, workers_of

PTRACE_SEIZE, WALL = 0x4206, 0x40000000
HANG = Request(Prompt.of("hang"), 0)


def test_a_stopped_worker_is_killed_and_every_request_is_answered_once(
    open_pool: Open, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = open_pool(OpenLetters(pause_s=0.005), patience_s=2.0)
    pool.wait_until_all_are_ready()
    asked = requests(60)
    submit(pool, asked)
    found = dict(pool.step())
    stopped = workers_of(temporary)[0]
    os.kill(stopped, signal.SIGSTOP)
    found |= finish(pool)
    assert found == alone(asked)
    wait_for(lambda: stopped not in workers_of(temporary), "the stopped worker is gone")
    (hung,) = [worker for worker in pool.workers if worker.deaths]
    assert (hung.deaths, hung.hung) == (1, 1) and hung.returned > 0
    assert re.search(r"worker [12] of 2 on GPU [01] has not moved for \d s, its process is T \(stopped\)", caplog.text)
    assert "raise sample.worker_patience_s" in caplog.text and "wait for another" in caplog.text
    told = pool.description["workers"]
    assert sorted(one["hung"] for one in told) == [0, 1]  # type: ignore[attr-defined]
    pool.wait_until_all_are_ready()
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())


def test_a_request_that_hangs_its_workers_is_named_and_all_others_are_answered(
    open_pool: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = open_pool(OpenLetters(capacity=1), patience_s=1.0)
    asked = requests(6)
    submit(pool, asked[:12])
    pool.submit("bad", HANG, SAMPLING)
    for place, request in enumerate(asked[12:], 12):
        pool.submit(str(place), request, SAMPLING)
    found: dict[str, Completion] = {}
    named = []
    while pool.unfinished:
        try:
            found |= dict(pool.step())
        except PoisonedRequest as error:
            named.append(error)
    assert found == alone(asked)
    assert [error.key for error in named] == ["bad"] and "has not moved for" in str(named[0])
    assert sum(worker.hung for worker in pool.workers) >= 3
    said = capfd.readouterr().err
    assert re.search(r'worker [12]:   File ".*letters\.py", line \d+ in step', said)  # where it hung


def test_a_pool_whose_only_worker_hangs_again_and_again_says_so(open_pool: Open) -> None:
    pool = open_pool(count=1, patience_s=0.5, pauses_s=())
    pool.submit("bad", HANG, SAMPLING)
    with pytest.raises(PoolFailed, match=r"worker 1 of 1 on GPU 0: has not moved for \d s, its process is S"):
        finish(pool)


def test_starting_reading_prompts_and_having_nothing_to_do_are_not_hanging(open_pool: Open) -> None:
    pool = open_pool(OpenLetters(capacity=8, open_s=2.5), patience_s=2.0)
    pool.wait_until_all_are_ready()
    asked = requests(16, 1, "heavy")
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())  # each worker reads for 2.4 s
    time.sleep(2.5)
    assert generate(pool, asked[:2], SAMPLING) == list(alone(asked[:2]).values())
    assert [worker.deaths for worker in pool.workers] == [0, 0]


def test_a_long_step_that_gets_on_is_not_hanging(open_pool: Open) -> None:
    pool = open_pool(count=1, patience_s=2.0)
    asked = [Request(Prompt.of("long"), 0)]
    assert generate(pool, asked, Sampling(1.0, 1)) == list(alone(asked, Sampling(1.0, 1)).values())  # three seconds
    assert pool.workers[0].deaths == 0


def test_a_pool_that_did_not_listen_itself_takes_nobody_for_hung(open_pool: Open, temporary: Path) -> None:
    """As when a whole job is suspended, and its processes wake up one after the other."""
    pool = open_pool(OpenLetters(pause_s=0.005), patience_s=2.0)
    pool.wait_until_all_are_ready()
    asked = requests(60)
    submit(pool, asked)
    found = dict(pool.step())
    for pid in workers_of(temporary):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3.0)
    found |= dict(pool.step())
    for pid in workers_of(temporary):
        os.kill(pid, signal.SIGCONT)
    found |= finish(pool)
    assert found == alone(asked) and [worker.deaths for worker in pool.workers] == [0, 0]


def test_a_guard_that_is_stopped_too_does_not_keep_its_worker(
    open_pool: Open, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_rl.engines.pool_places.KILLED_S", 1.0)
    pool = open_pool(OpenLetters(pause_s=0.005), patience_s=2.0)
    pool.wait_until_all_are_ready()
    asked = requests(60)
    submit(pool, asked)
    worker = workers_of(temporary)[0]
    guard = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
    assert guard in guards_of(temporary)
    for pid in (guard, worker):
        os.kill(pid, signal.SIGSTOP)
    assert finish(pool) == alone(asked)
    wait_for(lambda: not {guard, worker} & {*guards_of(temporary), *workers_of(temporary)}, "both are gone")


def test_a_worker_that_not_even_sigkill_ends_is_let_go_of(
    open_pool: Open, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with one that waits in a driver. Who traces a process (ptrace(2)) sees its end first, and may keep it."""
    monkeypatch.setattr("hpc_rl.engines.pool_places.KILLED_S", 1.0)
    pool = open_pool(OpenLetters(pause_s=0.005), patience_s=2.0)
    pool.wait_until_all_are_ready()
    asked = requests(60)
    submit(pool, asked)
    worker = workers_of(temporary)[0]
    if ctypes.CDLL(None).ptrace(PTRACE_SEIZE, worker, None, None):
        pytest.skip("this machine lets nobody trace processes")
    os.kill(worker, signal.SIGSTOP)
    assert finish(pool) == alone(asked)
    assert sum(worker.hung for worker in pool.workers) == 1
    assert os.waitpid(worker, WALL) == (worker, signal.SIGKILL)  # until here it was there
