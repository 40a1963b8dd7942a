"""Workers that hang: they are found, killed and replaced, and whoever is only slow is left alone.

The clock by which workers are silent is the test's: it goes on when those that do not hang have said a word, so that a
busy machine changes no verdict. In the last test it is the real one.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate
from hpc_rl.engines.pool import EnginePool, PoisonedRequest, PoolFailed
from hpc_rl.engines.pool_channel import Channel
from hpc_rl.engines.pool_places import LOOKS
from hpc_rl.engines.pool_slot import Slot
from tests.waiting import wait_for

from .letters import OpenLetters
from .pools import SAMPLING, Open, alone, guards_of, requests, submit, workers_of

PTRACE_SEIZE, WALL = 0x4206, 0x40000000
HANG = Request(Prompt.of("hang"), 0)
PATIENCE_S = 2.0
"""On the test's clock. Workers, whose clocks are real, say a word ten times as often."""

Hangs = Callable[[Slot], bool]


class Clock:
    """Stands still unless a test moves it."""

    def __init__(self, pool: EnginePool) -> None:
        self._now = time.monotonic()
        self.slots = pool._places.slots
        pool._places.clock = lambda: self._now

    def go_on(self, seconds: float = PATIENCE_S / LOOKS) -> None:
        self._now += seconds

    def go_on_if(self, hangs: Hangs) -> None:
        """Go on when a worker hangs and every other one has said something since the last time."""
        ready = [slot for slot in self.slots if slot.is_ready]
        if any(map(hangs, ready)) and not any(slot._silent_s for slot in ready if not hangs(slot)):
            self.go_on()


def is_process(pid: int) -> Hangs:
    return lambda slot: slot._pid == pid


def finish(pool: EnginePool, clock: Clock, hangs: Hangs) -> dict[str, Completion]:
    """All that is unfinished; none comes twice. Time passes for who hangs."""
    found: dict[str, Completion] = {}
    while pool.unfinished:
        clock.go_on_if(hangs)
        made = pool.step()
        assert not found.keys() & {key for key, _ in made}
        found |= dict(made)
    return found


def open_with_clock(open_pool: Open, *args: Any, **settings: Any) -> tuple[EnginePool, Clock]:
    """A pool whose workers are all ready."""
    pool = open_pool(*args, patience_s=PATIENCE_S, **settings)
    clock = Clock(pool)
    pool.wait_until_all_are_ready()
    return pool, clock


def submit_around(pool: EnginePool, stop: Callable[[], None]) -> tuple[list[Request], dict[str, Completion]]:
    """Requests, half of them from before `stop`: whom that stops has some. What was done before, too."""
    asked = requests(60)
    submit(pool, asked[:120])
    found = dict(pool.step())
    stop()
    for place, request in enumerate(asked[120:], 120):
        pool.submit(str(place), request, SAMPLING)
    return asked, found


def test_a_stopped_worker_is_killed_and_every_request_is_answered_once(
    open_pool: Open, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, clock = open_with_clock(open_pool, OpenLetters(pause_s=0.005))
    stopped = workers_of(temporary)[0]
    asked, found = submit_around(pool, lambda: os.kill(stopped, signal.SIGSTOP))
    found |= finish(pool, clock, is_process(stopped))
    assert found == alone(asked)
    wait_for(lambda: stopped not in workers_of(temporary), "the stopped worker is gone")
    (hung,) = [worker for worker in pool.workers if worker.deaths]
    assert (hung.deaths, hung.hung) == (1, 1) and hung.returned > 0
    assert re.search(r"worker [12] of 2 on GPU [01] has not moved for 2 s, its process is T \(stopped\)", caplog.text)
    assert "raise sample.worker_patience_s" in caplog.text and "wait for another" in caplog.text
    told = pool.description["workers"]
    assert sorted(one["hung"] for one in told) == [0, 1]  # type: ignore[attr-defined]
    pool.wait_until_all_are_ready()
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())


def test_a_request_that_hangs_its_workers_is_named_and_all_others_are_answered(open_pool: Open) -> None:
    pool, clock = open_with_clock(open_pool, OpenLetters(capacity=1))
    asked = requests(6)
    submit(pool, asked[:12])
    pool.submit("bad", HANG, SAMPLING)
    for place, request in enumerate(asked[12:], 12):
        pool.submit(str(place), request, SAMPLING)

    def has_bad(slot: Slot) -> bool:
        return any(item.key == "bad" for item in pool._queue._flight[slot.number].values())

    found: dict[str, Completion] = {}
    named = []
    while pool.unfinished:
        try:
            clock.go_on_if(has_bad)
            found |= dict(pool.step())
        except PoisonedRequest as error:
            named.append(error)
    assert found == alone(asked)
    assert [error.key for error in named] == ["bad"] and "has not moved for" in str(named[0])
    assert sum(worker.hung for worker in pool.workers) >= 3


def test_starting_is_not_hanging(open_pool: Open, temporary: Path) -> None:
    pool, clock = open_with_clock(open_pool, OpenLetters(open_s=1.0), count=1)
    asked = requests(2)
    submit(pool, asked)
    os.kill(workers_of(temporary)[0], signal.SIGKILL)

    def is_noticed() -> bool:
        pool._turn(0.01)
        return clock.slots[0].deaths == 1

    wait_for(is_noticed, "its end is noticed")
    turns = 0
    while not clock.slots[0].is_ready:
        clock.go_on()
        pool._turn(0.01)
        turns += 1
    assert turns > 2 * LOOKS, "it was silent for longer than a worker that hangs"
    while pool.unfinished:
        pool.step()
    assert [(worker.deaths, worker.hung) for worker in pool.workers] == [(1, 0)]


def test_having_nothing_to_do_is_not_hanging(open_pool: Open) -> None:
    pool, clock = open_with_clock(open_pool)
    asked = requests(4)
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())
    for _ in range(3 * LOOKS):
        clock.go_on()
        pool._turn(0.0)
    assert generate(pool, asked, SAMPLING) == list(alone(asked).values())
    assert [worker.deaths for worker in pool.workers] == [0, 0]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What this process has received from workers, by kind."""
    heard: Counter[str] = Counter()
    receive = Channel.receive

    def count(channel: Channel) -> list[tuple[Any, ...]]:
        messages = receive(channel)
        heard.update(kind for kind, *_ in messages)
        return messages

    monkeypatch.setattr(Channel, "receive", count)
    return heard


def test_a_worker_that_reads_prompts_says_so(open_pool: Open, words: Counter[str]) -> None:
    pool, _ = open_with_clock(open_pool, OpenLetters(capacity=8), count=1)
    asked = requests(8, 1, "heavy")  # 0.3 s each, longer than between two words
    submit(pool, asked)
    words.clear()
    found: dict[str, Completion] = {}
    while not found:
        found |= dict(pool.step())
    assert words["alive"] >= 8
    while pool.unfinished:
        found |= dict(pool.step())
    assert found == alone(asked)


def test_a_long_step_that_gets_on_says_so(open_pool: Open, words: Counter[str]) -> None:
    pool, _ = open_with_clock(open_pool, count=1)
    asked = [Request(Prompt.of("long"), 0)]
    words.clear()
    assert generate(pool, asked, Sampling(1.0, 1)) == list(alone(asked, Sampling(1.0, 1)).values())  # three seconds
    assert words["alive"] >= 10


def test_a_pool_that_did_not_listen_itself_takes_nobody_for_hung(open_pool: Open, temporary: Path) -> None:
    """As when a whole job is suspended, and its processes wake up one after the other."""
    pool, clock = open_with_clock(open_pool, OpenLetters(pause_s=0.005))

    def stop_all() -> None:
        for pid in workers_of(temporary):
            os.kill(pid, signal.SIGSTOP)

    asked, found = submit_around(pool, stop_all)
    clock.go_on(3 * PATIENCE_S)
    found |= dict(pool.step())
    for pid in workers_of(temporary):
        os.kill(pid, signal.SIGCONT)
    found |= finish(pool, clock, lambda slot: False)
    assert found == alone(asked) and [worker.deaths for worker in pool.workers] == [0, 0]


def test_a_guard_that_is_stopped_too_does_not_keep_its_worker(
    open_pool: Open, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_rl.engines.pool_places.KILLED_S", 1.0)
    pool, clock = open_with_clock(open_pool, OpenLetters(pause_s=0.005))
    worker = workers_of(temporary)[0]
    guard = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
    assert guard in guards_of(temporary)

    def stop_both() -> None:
        for pid in (guard, worker):
            os.kill(pid, signal.SIGSTOP)

    asked, found = submit_around(pool, stop_both)
    found |= finish(pool, clock, is_process(worker))
    assert found == alone(asked)
    wait_for(lambda: not {guard, worker} & {*guards_of(temporary), *workers_of(temporary)}, "both are gone")


def test_a_worker_that_not_even_sigkill_ends_is_let_go_of(
    open_pool: Open, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with one that waits in a driver. Who traces a process (ptrace(2)) sees its end first, and may keep it."""
    monkeypatch.setattr("hpc_rl.engines.pool_places.KILLED_S", 1.0)
    pool, clock = open_with_clock(open_pool, OpenLetters(pause_s=0.005))
    worker = workers_of(temporary)[0]
    if ctypes.CDLL(None).ptrace(PTRACE_SEIZE, worker, None, None):
        pytest.skip("this machine lets nobody trace processes")
    asked, found = submit_around(pool, lambda: os.kill(worker, signal.SIGSTOP))
    found |= finish(pool, clock, is_process(worker))
    assert found == alone(asked)
    assert sum(worker.hung for worker in pool.workers) == 1
    assert os.waitpid(worker, WALL) == (worker, signal.SIGKILL)  # until here it was there


def test_a_pool_whose_only_worker_hangs_says_so_and_where(open_pool: Open, capfd: pytest.CaptureFixture[str]) -> None:
    """On real clocks: whenever the worker is taken for hung, it is right, or about to be."""
    pool = open_pool(count=1, patience_s=5.0, pauses_s=())
    pool.submit("bad", HANG, SAMPLING)
    with pytest.raises(PoolFailed, match=r"worker 1 of 1 on GPU 0: has not moved for \d+ s, its process is S"):
        while pool.unfinished:
            pool.step()
    assert re.search(r'worker 1:   File ".*letters\.py", line \d+ in step', capfd.readouterr().err)
