"""Work for a loop of another thread: nobody waits for ever, and no more is begun than is done at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from hpc_rl.services.loop_thread import Closed, LoopThread, each
from tests.waiting import PATIENCE_S


async def nothing() -> None:
    pass


def test_threads_that_ask_while_it_closes_get_an_answer_or_are_told() -> None:
    for _ in range(30):
        loop, ends = LoopThread("asked"), list[str]()

        def ask(loop: LoopThread = loop, ends: list[str] = ends) -> None:
            try:
                while True:
                    loop.run(asyncio.sleep(0))
            except Closed as error:
                ends.append(str(error))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        loop.close(nothing)
        for thread in threads:
            thread.join(PATIENCE_S)
        assert len(ends) == 8 and set(ends) <= {"asked is closed", "asked was closed before this was done"}


def test_what_is_begun_while_the_last_thing_is_done_is_refused_and_what_is_under_way_is_cancelled() -> None:
    loop, begun, errors = LoopThread("slow"), threading.Event(), list[Exception]()

    async def long() -> None:
        begun.set()
        await asyncio.sleep(600)

    def ask() -> None:
        try:
            loop.run(long())
        except Closed as error:
            errors.append(error)

    async def last() -> None:
        for _ in range(2):
            with pytest.raises(Closed, match="slow is closed"):
                await asyncio.to_thread(lambda: loop.run(nothing()))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert begun.wait(PATIENCE_S)
    loop.close(last)
    loop.close(last)
    asking.join(PATIENCE_S)
    assert str(errors[0]) == "slow was closed before this was done"


def test_each_begins_as_many_as_may_run_at_once_and_keeps_the_order() -> None:
    most = 0

    async def double(number: int) -> int:
        nonlocal most
        most = max(most, len(asyncio.all_tasks()))
        await asyncio.sleep(0.001 * (number % 3))
        return 2 * number

    assert asyncio.run(each(range(100), double, 4)) == [2 * number for number in range(100)]
    assert most <= 4 + 1, "the caller's own, and one for each that may run"
    assert asyncio.run(each([], double, 4)) == []


def test_the_first_error_ends_the_others() -> None:
    begun, cancelled = list[int](), list[int]()

    async def fail(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ValueError("one")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    with pytest.raises(ValueError, match="one"):
        asyncio.run(each(range(1000), fail, 3))
    assert begun == [0, 1, 2] and sorted(cancelled) == [0, 2]
