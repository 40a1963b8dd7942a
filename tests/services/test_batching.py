"""The queue and the batcher: turns, bounds, order, and that nothing is lost, whoever gives up or hangs up."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.services.batching import Batcher, ClientOverloaded, ModelFailed, Overloaded
from hpc_rl.services.queue import TURN_ITEMS, FairQueue, Pace, Waiting
from tests.waiting import PATIENCE_S

REQUESTS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 40)), min_size=1, max_size=30)


def queue_of(requests: Sequence[tuple[str, int]]) -> tuple[FairQueue[Waiting[Any]], list[Waiting[Any]]]:
    queue: FairQueue[Waiting[Any]] = FairQueue(10_000, 10_000)
    made = [Waiting(client, range(count)) for client, count in requests]
    for request in made:
        queue.add(request)
    return queue, made


def take(queue: FairQueue[Waiting[Any]], count: int) -> list[tuple[Waiting[Any], int]]:
    """(request, item) of the next batch."""
    return [
        (piece.request, item) for piece in queue.take(count) for item in piece.request.items[piece.start : piece.stop]
    ]


@given(REQUESTS, st.integers(1, 70))
def test_every_item_is_taken_once_in_the_order_of_its_client_in_full_batches(
    requests: list[tuple[str, int]], batch_size: int
) -> None:
    queue, made = queue_of(requests)
    batches = []
    while queue.items:
        before = queue.items
        batches.append(take(queue, batch_size))
        assert len(batches[-1]) == min(batch_size, before) and queue.items == before - len(batches[-1])
    order = [pair for batch in batches for pair in batch]
    for client in "abcdef":
        its = [(request, item) for request in made if request.client == client for item in request.items]
        assert [(request, item) for request, item in order if request.client == client] == its
    assert queue.clients == 0


@given(REQUESTS, st.integers(1, 70))
def test_clients_that_wait_are_served_alike(requests: list[tuple[str, int]], batch_size: int) -> None:
    """As long as two clients both wait, neither is ahead of the other by more than one turn and a part of one."""
    queue, _ = queue_of(requests)
    waiting = Counter({client: queue.of(client) for client in "abcdef"})
    served: Counter[str] = Counter()
    turn = max(min(TURN_ITEMS, batch_size), batch_size)  # the largest share is the whole batch, for who is alone
    while queue.items:
        served.update(request.client for request, _ in take(queue, batch_size))
        for one in served:
            for other in served:
                if served[one] < waiting[one] and served[other] < waiting[other]:
                    assert abs(served[one] - served[other]) <= 2 * turn


@given(st.integers(1, 8), st.integers(8, 70), st.integers(1, TURN_ITEMS))
def test_a_few_items_wait_for_one_turn_of_each_other_client_however_much_they_have(
    others: int, batch_size: int, items: int
) -> None:
    queue, _ = queue_of([(str(number), 1000) for number in range(others)])
    take(queue, batch_size)
    late: Waiting[Any] = Waiting("late", range(items))
    queue.add(late)
    before = 0
    while late.left:
        before += sum(request is not late for request, _ in take(queue, batch_size))
    assert before <= max(batch_size, others * TURN_ITEMS) + batch_size


def test_who_has_three_items_is_in_the_next_batch_though_four_thousand_wait_before() -> None:
    queue, _ = queue_of([("heavy", 1000)] * 4)
    take(queue, 64)
    queue.add(light := Waiting("light", range(3)))
    take(queue, 64)
    assert light.left == 0


def test_a_turn_is_not_torn_where_nobody_loses_by_it() -> None:
    queue, _ = queue_of([("a", 100), ("b", 100)])
    assert [(piece.request.client, piece.start, piece.stop) for piece in queue.take(64)] == [("a", 0, 32), ("b", 0, 32)]
    queue, _ = queue_of([("a", 100)])
    assert [(piece.start, piece.stop) for piece in queue.take(64)] == [(0, 64)]


@given(REQUESTS, st.data())
def test_what_is_dropped_frees_its_place_and_the_rest_is_served(requests: list[tuple[str, int]], data: Any) -> None:
    queue, made = queue_of(requests)
    begun = {(id(request), item) for request, item in take(queue, data.draw(st.integers(0, 100)))}
    dropped = data.draw(st.sets(st.sampled_from(made)))
    for request in dropped:
        queue.drop(request)
        queue.drop(request)  # twice is once
    assert queue.items == sum(request.left for request in made if request not in dropped)
    for client in "abcdef":
        assert queue.of(client) == sum(r.left for r in made if r.client == client and r not in dropped)
    rest = {(id(request), item) for request, item in take(queue, 10_000)}
    assert rest == {(id(r), i) for r in made if r not in dropped for i in r.items} - begun
    assert queue.items == queue.clients == 0


class Model:
    """Doubles numbers, once it is let; notes its batches. Negative ones break it."""

    def __init__(self, open_at_once: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Semaphore(1_000_000 if open_at_once else 0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.acquire(timeout=PATIENCE_S)
        if min(items) < 0:
            raise ValueError("negative")
        return [2 * item for item in items]


def batcher(model: Model, **options: Any) -> Batcher[int, int]:
    return Batcher(model, **{"batch_size": 4, "batch_wait_s": 0.0, "max_waiting": 100, **options})


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.booleans()), max_size=20),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_every_request_gets_its_own_results_in_order_or_frees_its_place(
    requests: list[tuple[str, int, bool]], batch_size: int, workers: int
) -> None:
    """Some clients hang up somewhere on the way."""

    async def run() -> None:
        tasks = []
        for number, (client, count, hangs_up) in enumerate(requests):
            items = range(1000 * number, 1000 * number + count)
            tasks.append((asyncio.create_task(work.submit(items, PATIENCE_S, client)), items, hangs_up))
        await asyncio.sleep(0)
        for task, _, hangs_up in tasks[::2]:
            if hangs_up:
                task.cancel()
                await asyncio.sleep(0)
        for task, items, _ in tasks:
            try:
                assert await task == [2 * item for item in items]
            except asyncio.CancelledError:
                assert task.cancelled()

    work = batcher(Model(), batch_size=batch_size, workers=workers, max_waiting=1000)
    asyncio.run(run())
    assert work.close(PATIENCE_S) and work.waiting == 0 and work.counters.largest_batch <= batch_size


def test_the_queue_is_bounded_in_all_and_for_each_client_and_says_when_to_come_again() -> None:
    model = Model(open_at_once=False)
    work = batcher(model, max_waiting=10, max_client_waiting=6)

    async def run() -> None:
        first = [asyncio.create_task(work.submit(range(4), PATIENCE_S, "a"))]
        await until(lambda: model.batches)
        first.append(asyncio.create_task(work.submit(range(5), PATIENCE_S, "a")))
        await until(lambda: work.waiting == 5)
        with pytest.raises(ClientOverloaded, match="5 items of this client wait already") as refused:
            await work.submit(range(2), PATIENCE_S, "a")
        assert 1 <= refused.value.retry_after_s <= 60
        first.append(asyncio.create_task(work.submit(range(5), PATIENCE_S, "b")))
        await until(lambda: work.waiting == 10 and work.full)
        with pytest.raises(Overloaded, match="10 items wait already") as refused:
            await work.submit([1], PATIENCE_S, "c")
        assert not isinstance(refused.value, ClientOverloaded) and 1 <= refused.value.retry_after_s <= 60
        model.gate.release(100)
        assert [len(results) for results in await asyncio.gather(*first)] == [4, 5, 5]
        assert await work.submit([3], PATIENCE_S, "c") == [6]

    asyncio.run(run())
    assert work.counters.refused == 2
    work.close()


def test_retry_after_follows_what_the_model_did_lately() -> None:
    pace = Pace()
    assert pace.seconds_for(1_000_000) == 1  # nothing is known yet
    for _ in range(50):
        pace.took(10, 2.0)
    assert [pace.seconds_for(items) for items in (1, 100, 10_000)] == [1, pytest.approx(20), 60]
    for _ in range(50):
        pace.took(10, 0.2)
    assert pace.seconds_for(100) == pytest.approx(2, rel=0.01)


def test_who_hangs_up_or_gives_up_frees_the_items_that_were_not_begun() -> None:
    model = Model(open_at_once=False)
    work = batcher(model)

    async def run() -> None:
        partly = asyncio.create_task(work.submit(range(10), PATIENCE_S, "a"))
        await until(lambda: model.batches == [[0, 1, 2, 3]])
        late = asyncio.create_task(work.submit(range(100, 105), 0.05, "b"))
        with pytest.raises(Overloaded, match=r"no turn within 0\.05 s"):
            await late
        assert work.waiting == 6
        partly.cancel()
        with pytest.raises(asyncio.CancelledError):
            await partly
        assert work.waiting == 0 and work.counters.abandoned == 1
        model.gate.release(100)
        assert await work.submit([7], PATIENCE_S, "c") == [14]

    asyncio.run(run())
    assert model.batches == [[0, 1, 2, 3], [7]]
    work.close()


def test_a_batch_that_fails_fails_its_requests_only_and_is_told_of() -> None:
    model, told = Model(open_at_once=False), []
    work = batcher(model, on_batch=lambda items, seconds, failed: told.append((items, seconds >= 0, failed)))

    async def run() -> None:
        bad = asyncio.create_task(work.submit([-1] * 9, PATIENCE_S, "a"))
        await until(lambda: model.batches)
        good = asyncio.create_task(work.submit([1, 2], PATIENCE_S, "b"))
        await until(lambda: work.waiting == 7)
        model.gate.release(100)
        with pytest.raises(ModelFailed, match="ValueError: negative"):
            await bad
        assert await good == [2, 4]
        assert work.waiting == 0

    asyncio.run(run())
    assert work.counters.failed_batches == 1 and work.counters.failed_in_a_row == 0
    work.close()
    assert told == [(4, True, True), (2, True, False)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=24),
    st.integers(2, 32),
    st.integers(1, 2),
)
def test_a_request_that_the_model_fails_at_fails_and_the_model_is_not_asked_for_ever(
    requests: list[tuple[int, bool]], batch_size: int, workers: int
) -> None:
    """Of requests that it does not fail at, those succeed that do not share a batch with several that it fails at."""
    model, told = Model(), []
    work = batcher(
        model,
        batch_size=batch_size,
        workers=workers,
        batch_wait_s=0.05,
        on_batch=lambda items, seconds, failed: told.append(failed),
    )

    async def run() -> list[Any]:
        asked = [[-1 if bad and item == 0 else item for item in range(count)] for count, bad in requests]
        return await asyncio.gather(*(work.submit(items, PATIENCE_S) for items in asked), return_exceptions=True)

    answers = asyncio.run(run())
    assert work.close(PATIENCE_S) and work.waiting == 0
    for (count, bad), answer in zip(requests, answers, strict=True):
        assert isinstance(answer, ModelFailed) if bad else isinstance(answer, ModelFailed | list)
        if isinstance(answer, list):
            assert answer == [2 * item for item in range(count)]
    if sum(bad for _, bad in requests) <= 2:
        assert [isinstance(answer, ModelFailed) for answer in answers] == [bad for _, bad in requests]
    assert len(told) == work.counters.batches and sum(told) == work.counters.failed_batches
    assert work.counters.items <= sum(count for count, _ in requests)
    assert len(model.batches) <= work.counters.batches * 3 * (batch_size.bit_length() + 1)


def test_one_bad_request_fails_alone_and_the_model_is_well() -> None:
    model = Model(open_at_once=False)
    work = batcher(model, batch_size=64)

    async def run() -> None:
        first = asyncio.create_task(work.submit([1], PATIENCE_S))
        await until(lambda: model.batches)
        tasks = [
            asyncio.create_task(work.submit([number, -1 if number == 5 else number], PATIENCE_S, str(number)))
            for number in range(16)
        ]
        await until(lambda: work.waiting == 32)
        model.gate.release(1000)
        assert await first == [2]
        for number, answer in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
            if number == 5:
                assert isinstance(answer, ModelFailed) and str(answer) == "ValueError: negative"
            else:
                assert answer == [2 * number, 2 * number]

    asyncio.run(run())
    assert work.counters.failed_batches == 1 and work.counters.failed_in_a_row == 0 and work.counters.batches == 2
    assert len(model.batches) == 2 + 2 * 4
    work.close()


def test_a_model_that_always_fails_is_not_asked_about_each_request() -> None:
    model = Model(open_at_once=False)
    work = batcher(model, batch_size=64)

    async def run() -> None:
        tasks = [asyncio.create_task(work.submit([-1], PATIENCE_S, str(number))) for number in range(65)]
        await until(lambda: work.waiting)
        model.gate.release(1000)
        assert all(isinstance(answer, ModelFailed) for answer in await asyncio.gather(*tasks, return_exceptions=True))

    asyncio.run(run())
    assert work.counters.failed_in_a_row == work.counters.failed_batches == work.counters.batches
    assert len(model.batches) <= work.counters.batches + 3 * 7
    work.close()


def test_closing_finishes_what_waits_and_refuses_what_is_new() -> None:
    model = Model(open_at_once=False)
    work = batcher(model)

    async def run() -> None:
        waiting = asyncio.create_task(work.submit(range(9), PATIENCE_S))
        await until(lambda: work.waiting == 5)
        assert not work.close(0.0)
        with pytest.raises(Overloaded, match="leaving"):
            await work.submit([1], PATIENCE_S)
        model.gate.release(100)
        assert await waiting == [2 * item for item in range(9)]

    asyncio.run(run())
    assert work.close(PATIENCE_S)
