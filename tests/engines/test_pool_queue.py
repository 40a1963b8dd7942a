"""The queue of a pool: groups stay together, nobody is idle, nothing is lost or done twice, killers are found."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.engines.base import Prompt, Request, Sampling
from hpc_rl.engines.pool_queue import RequestQueue

SAMPLING = Sampling(1.0, 8)


def fill(queue: RequestQueue, groups: int, size: int) -> None:
    for group in range(groups):
        prompt = Prompt.of(f"prompt {group}")
        for number in range(size):
            queue.add(f"{group}-{number}", Request(prompt, number), SAMPLING)


def hand_out(queue: RequestQueue, rooms: dict[int, tuple[int, int]]) -> dict[int, list[str]]:
    """Keys by worker."""
    sent: dict[int, list[str]] = {worker: [] for worker in rooms}
    for worker, items in queue.take(rooms):
        sent[worker] += [item.key for item in items]
    return sent


def groups_of(keys: list[str]) -> set[str]:
    return {key.split("-")[0] for key in keys}


def test_groups_stay_together_and_workers_get_equally_much() -> None:
    queue = RequestQueue(3)
    fill(queue, 6, 4)
    sent = hand_out(queue, {0: (8, 10), 1: (8, 10), 2: (8, 10)})
    assert [len(keys) for keys in sent.values()] == [8, 8, 8]
    assert [len(groups_of(keys)) for keys in sent.values()] == [2, 2, 2]


def test_the_rest_of_a_group_follows_and_so_do_its_retries() -> None:
    queue = RequestQueue(2)
    prompts = [Prompt.of("a"), Prompt.of("b")]
    for number in range(6):
        queue.add(f"{number % 2}-{number}", Request(prompts[number % 2], number), SAMPLING)
    first = queue.take({0: (2, 2), 1: (2, 2)})
    homes = {worker: items[0].group for worker, items in first}
    for worker, items in first:
        assert len(items) == 2 and {item.group for item in items} == {homes[worker]}
        queue.finished(worker, items[0].id)
    for worker, items in queue.take({0: (2, 2), 1: (2, 2)}):
        assert [item.group for item in items] == [homes[worker]]
    for name, prompt in zip("ab", prompts, strict=True):
        queue.add(f"{name}-retry", Request(prompt, 99), SAMPLING)
        ((worker, (item,)),) = queue.take({0: (9, 9), 1: (9, 9)})
        assert item.key == f"{name}-retry" and item.group is homes[worker]
        queue.finished(worker, item.id)


def test_a_worker_without_work_takes_from_the_others() -> None:
    queue = RequestQueue(2)
    fill(queue, 1, 8)
    assert hand_out(queue, {0: (3, 3)}) == {0: ["0-0", "0-1", "0-2"]}
    assert hand_out(queue, {0: (3, 3), 1: (3, 3)}) == {0: [], 1: ["0-3", "0-4", "0-5"]}


def test_what_a_dead_worker_had_goes_first_and_in_order() -> None:
    queue = RequestQueue(2)
    fill(queue, 6, 1)
    sent = hand_out(queue, {0: (2, 2)})
    assert queue.died(0, suspicious=True) is None
    assert hand_out(queue, {1: (3, 3)}) == {1: [*sent[0], "2-0"]}


def test_aborted_requests_are_neither_sent_nor_returned() -> None:
    queue = RequestQueue(1)
    fill(queue, 2, 2)
    ((_, items),) = queue.take({0: (2, 2)})
    assert queue.abort(["0-0", "1-1", "unknown"]) == {0: [items[0].id]}
    assert queue.finished(0, items[0].id) is None
    assert hand_out(queue, {0: (8, 8)}) == {0: ["1-0"]}
    assert len(queue) == 2


def test_prompts_are_forgotten_with_their_last_request_unless_somebody_holds_them() -> None:
    queue = RequestQueue(1)
    held = Prompt.of("held")
    queue.add("a", Request(held, 0), SAMPLING)
    queue.add("b", Request(Prompt.of("not held"), 0), SAMPLING)
    ids = {item.key: (item.id, item.group.number) for _, items in queue.take({0: (4, 4)}) for item in items}
    assert queue.gone_prompts() == []
    for number, _ in ids.values():
        queue.finished(0, number)
    gc.collect()
    assert queue.gone_prompts() == [ids["b"][1]]


def run_to_the_end(
    queue: RequestQueue, workers: int, choose: Callable[[int], int], bad: set[str]
) -> tuple[list[str], list[str], int]:
    """Workers finish requests or die in any order; one that holds a bad request never finishes, and dies in the end.

    Returns keys in order of completion, keys that were found to kill, and the number of deaths.
    """
    done: list[str] = []
    killers: list[str] = []
    deaths = 0
    held: dict[int, dict[int, str]] = {worker: {} for worker in range(workers)}
    while len(queue):
        for worker, items in queue.take(dict.fromkeys(range(workers), (3, 4))):
            held[worker] |= {item.id: item.key for item in items}
        busy = [worker for worker in held if held[worker]]
        worker = busy[choose(len(busy))]
        fine = [number for number, key in held[worker].items() if key not in bad]
        if fine and (len(fine) == len(held[worker]) or choose(2)):
            number = fine[choose(len(fine))]
            assert queue.finished(worker, number) is not None
            done.append(held[worker].pop(number))
        else:
            held[worker], deaths = {}, deaths + 1
            if (killer := queue.died(worker, suspicious=True)) is not None:
                killers.append(killer.key)
    return done, killers, deaths


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_request_is_done_once_except_those_that_kill(data: st.DataObject) -> None:
    workers, groups, size = (data.draw(st.integers(1, most)) for most in (4, 6, 5))
    queue = RequestQueue(workers)
    fill(queue, groups, size)
    keys = {f"{group}-{number}" for group in range(groups) for number in range(size)}
    bad = data.draw(st.sets(st.sampled_from(sorted(keys)), max_size=3))
    done, killers, deaths = run_to_the_end(queue, workers, lambda n: data.draw(st.integers(0, n - 1)), bad)
    assert sorted(done) == sorted(keys - bad)
    assert sorted(killers) == sorted(bad)
    # two deaths that raise suspicion, then a search by halves among what one worker may hold
    assert deaths <= len(bad) * (2 + 3)


@pytest.mark.parametrize("in_flight", [1, 7, 300])
def test_a_killer_among_many_is_found_by_halving(in_flight: int) -> None:
    queue = RequestQueue(1)
    fill(queue, in_flight, 1)
    deaths = 0
    while True:
        items = [item for _, items in queue.take({0: (256, 320)}) for item in items]
        if not any(item.key == "0-0" for item in items):
            for item in items:
                queue.finished(0, item.id)
            continue
        deaths += 1
        if (found := queue.died(0, suspicious=True)) is not None:
            break
    assert found.key == "0-0"
    assert deaths <= 2 + 1 + (in_flight - 1).bit_length()


def test_running_out_of_memory_makes_no_request_suspicious() -> None:
    queue = RequestQueue(1)
    fill(queue, 1, 3)
    for _ in range(5):
        assert len(hand_out(queue, {0: (4, 4)})[0]) == 3
        assert queue.died(0, suspicious=False) is None
        assert not queue.is_trial(0)
