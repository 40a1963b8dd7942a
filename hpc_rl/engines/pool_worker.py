"""A worker of a pool: one engine, asked over a socket.

`python -m hpc_rl.engines.pool_worker SOCKET`, run by the worker's guard. What the engine sees of the machine
(CUDA_VISIBLE_DEVICES, ports, folder of temporary files) is in the environment before torch or vllm are imported.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hpc_rl.engines.base import Engine, LongSteps, Prompt, Request, Sampling
from hpc_rl.engines.feed import Feed
from hpc_rl.engines.pool_channel import Channel

LAST_WORDS_S = 5.0
BEAT_S = 1.0
"""A worker that has requests says so often that its loop gets on: ten times as often as it must, and no oftener."""


class Worker:
    """Does what the pool says until the pool closes.

    Messages that it gets: `prompt` (its number, the Prompt), `submit` (requests of one prompt), `forget` (prompts that
    will not be asked any more), `abort`, `close`. Messages that it sends: `ready`, `finished`, `refused`, `failed`, and
    `alive` when its loop gets on.

    Parameters
    ----------
    channel, engine
        To the pool; what samples.
    patience_s
        How long the pool waits for a word while there are requests. Shortly before, it prints where its threads are.
    """

    def __init__(self, channel: Channel, engine: Engine, patience_s: float) -> None:
        self._channel, self._feed, self._patience_s = channel, Feed(engine), patience_s
        self._prompts: dict[int, Prompt] = {}
        self._busy_s = 0.0
        self._beat_at = 0.0
        if isinstance(engine, LongSteps):
            engine.tell_progress(self._gets_on)

    def run(self) -> None:
        """Work until the pool closes, or is gone."""
        while True:
            if not len(self._feed):
                faulthandler.cancel_dump_traceback_later()
                self._channel.wait()
                self._beat_at = 0.0
            for kind, *content in self._channel.receive():
                if kind == "close":
                    return
                getattr(self, f"_on_{kind}")(*content)
                self._gets_on()
            if self._channel.ended:
                return
            self._hand_over()
            if self._feed.submitted:
                started = time.monotonic()
                finished = self._feed.step()
                self._busy_s += time.monotonic() - started
                if finished:
                    self._channel.send("finished", [(int(key), made) for key, made in finished], self._busy_s)
                self._gets_on()
            self._channel.flush()

    def _gets_on(self) -> None:
        """Say so, now and then. Only ever called by the loop's own thread: a step that hangs is silent."""
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + min(BEAT_S, self._patience_s / 10)
            self._channel.send("alive")
            faulthandler.dump_traceback_later(0.9 * self._patience_s)

    def _hand_over(self) -> None:
        for refused in self._feed.hand_over(self._feed.fill_until):
            for key, error in refused:
                self._channel.send("refused", int(key), str(error))
            self._gets_on()

    def _on_prompt(self, number: int, prompt: Prompt) -> None:
        self._prompts[number] = prompt

    def _on_submit(self, prompt_number: int, requests: list[tuple[int, int, Sampling]]) -> None:
        prompt = self._prompts[prompt_number]
        self._feed.append((str(number), Request(prompt, seed), sampling) for number, seed, sampling in requests)

    def _on_forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._prompts.pop(number, None)

    def _on_abort(self, numbers: list[int]) -> None:
        self._feed.abort({str(number) for number in numbers})


def open_and_work(channel: Channel) -> None:
    """Open the engine that the pool's first message names, and work."""
    messages: list[tuple[Any, ...]] = []
    while not messages:
        channel.wait()
        messages = channel.receive()
        if channel.ended:
            return
    (_, path, opener, lowered, patience_s), *later = messages
    assert not later  # the pool sends no work before it has heard from us
    sys.path[:] = path
    open_engine: Callable[[int], Any] = pickle.loads(opener)
    engine = open_engine(lowered)
    try:
        description = dict(getattr(engine, "description", {}))
        loading = dict(getattr(engine, "loading", {}))
        # transformers draws a batch from its beginning to its end: the next one must be here by then
        ahead = engine.capacity if getattr(engine, "kind", "") == "transformers" else max(2, engine.capacity // 4)
        channel.send("ready", os.getpid(), engine.capacity, ahead, description, loading)
        Worker(channel, engine, patience_s).run()
    finally:
        engine.close()


def main(argv: list[str]) -> int:
    """Run the worker at the other end of a socket."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: None)  # the pool decides when we leave; what we start hears signals as usual
    number = int(argv[0])
    os.set_inheritable(number, False)  # else what the engine starts would hold it open after our end
    channel = Channel(socket.socket(fileno=number))
    try:
        open_and_work(channel)
    except BaseException as error:
        text = "".join(traceback.format_exception_only(error)).strip()
        channel.send("failed", text, isinstance(error, ValueError))
        channel.drain(LAST_WORDS_S)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
