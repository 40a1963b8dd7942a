"""A pool's worker hands requests over as their prompts are read; its engine does not stand still for a photo."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from threading import Thread
from typing import Any

import pytest

from hpc_rl.engines.base import Prompt, Request, Sampling
from hpc_rl.engines.feed import READ_AHEAD
from hpc_rl.engines.pool_channel import Channel
from hpc_rl.engines.pool_worker import Worker
from tests.waiting import wait_for

from .letters import LettersEngine, text_of

ENDLESS = Sampling(1.0, 1_000_000)


class SlowReader(LettersEngine):
    """Photos are read when the test says so; a text at once. Nothing that it samples ends by itself."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, 0.001, None)
        self.read: set[str] = set()
        self.most_expected = 0
        self.steps = 0
        self.done: set[str] = set()

    def expect(self, prompts: Sequence[Prompt]) -> int:
        self.most_expected = max(self.most_expected, len(prompts))
        return sum(1 for _ in takewhile(self._is_read, prompts))

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        assert self._is_read(request.prompt) or not self.unfinished, "the batch is kept waiting"
        super().submit(key, request, sampling)

    def step(self) -> list[tuple[str, Any]]:
        self.steps += 1
        finished = [(key, self._completion(row)) for key, row in self._rows.items() if key in self.done and row.tokens]
        self.abort([key for key, _ in finished])
        for row in self._rows.values():
            row.tokens.append(0)
        return finished

    def _is_read(self, prompt: Prompt) -> bool:
        return "photo" not in text_of(prompt) or text_of(prompt) in self.read


class Pool:
    """The other end of a worker that runs in a thread of this process."""

    def __init__(self, engine: SlowReader) -> None:
        ours, theirs = socket.socketpair()
        self.channel, self.engine = Channel(ours), engine
        self._thread = Thread(target=Worker(Channel(theirs), engine, 600.0).run)
        self._thread.start()
        self.heard: dict[str, list[Any]] = defaultdict(list)

    def ask(self, number: int, text: str, requests: int = 1) -> None:
        self.channel.send("prompt", number, Prompt.of(text))
        self.channel.send("submit", number, [(10 * number + place, 0, ENDLESS) for place in range(requests)])

    def finished(self) -> set[int]:
        for kind, *content in self.channel.receive():
            self.heard[kind].append(content)
        return {number for made, _ in self.heard["finished"] for number, _ in made}

    def close(self) -> None:
        self.channel.send("close")
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(SlowReader(capacity=100))
    yield made
    made.close()


def goes_on(engine: SlowReader, steps: int = 20) -> None:
    before = engine.steps
    wait_for(lambda: engine.steps >= before + steps, "the engine goes on")


def test_an_engine_with_work_does_not_wait_for_a_photo(pool: Pool) -> None:
    engine = pool.engine
    pool.ask(1, "text")
    goes_on(engine)
    pool.ask(2, "photo a", requests=3)
    pool.ask(3, "text, behind it")
    wait_for(lambda: engine.most_expected == 2, "both that wait are expected")
    goes_on(engine)
    assert engine.unfinished == 1
    engine.read.add("photo a")
    wait_for(lambda: engine.unfinished == 5, "those that waited are in the batch")
    engine.done |= {"10", "20", "21", "22", "30"}
    wait_for(lambda: pool.finished() == {10, 20, 21, 22, 30}, "all have finished")


def test_an_engine_without_work_waits_for_the_first_prompt_whatever_it_is(pool: Pool) -> None:
    pool.ask(1, "photo a")
    wait_for(lambda: pool.engine.unfinished == 1, "it is handed over though it is not read")


def test_few_prompts_are_read_ahead_of_their_turn(pool: Pool) -> None:
    pool.ask(1, "text")
    goes_on(pool.engine)
    for number in range(2, 2 + 3 * READ_AHEAD):
        pool.ask(number, f"photo {number}")
    wait_for(lambda: pool.engine.most_expected == READ_AHEAD, "as many as may be are expected")
    goes_on(pool.engine)
    assert pool.engine.most_expected == READ_AHEAD and pool.engine.unfinished == 1


def test_what_is_aborted_while_it_waits_never_reaches_the_engine(pool: Pool) -> None:
    engine = pool.engine
    pool.ask(1, "text")
    goes_on(engine)
    pool.ask(2, "photo a", requests=2)
    wait_for(lambda: engine.most_expected == 1, "the photo is expected")
    pool.channel.send("abort", [20])
    goes_on(engine)
    engine.read.add("photo a")
    engine.done |= {"20", "21"}
    wait_for(lambda: pool.finished(), "what was left has finished")
    assert pool.finished() == {21} and engine.unfinished == 1
