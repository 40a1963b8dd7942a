"""A language model of eight letters: an engine without torch, so that a pool of them is there in a moment.

It samples as the others do: a token a step for each request in its batch, from a distribution that the prompt and the
letters so far decide, by the request's own seed. Some prompts are bad for it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling

LETTERS = "abcdefgh"
END = LETTERS.index("h")


def text_of(prompt: Prompt) -> str:
    return str(prompt.messages[0]["content"][-1]["text"])


@dataclass
class _Row:
    request: Request
    sampling: Sampling
    rng: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LettersEngine:
    """Draws letters; `capacity` rows at once, the others wait."""

    kind = "letters"

    def __init__(self, capacity: int, pause_s: float, notes: Path | None) -> None:
        self.capacity, self._pause_s, self._notes = capacity, pause_s, notes
        self._rows: dict[str, _Row] = {}
        self._tell: Callable[[], None] = lambda: None
        sees = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "VLLM_PORT", "OMP_NUM_THREADS")}
        self.description = {"engine": self.kind, "capacity": capacity, **sees}
        self.loading = {"engine": 0.25}

    @property
    def unfinished(self) -> int:
        return len(self._rows)

    def expect(self, prompts: Sequence[Prompt]) -> int:
        return len(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        text = text_of(request.prompt)
        if "refuse" in text:
            raise ValueError(f"the prompt {text!r} is too long")
        if "heavy" in text:
            time.sleep(0.3)
        if "helper" in text:
            self._start_helper()
        if self._notes is not None:
            with (self._notes / str(os.getpid())).open("a") as file:
                file.write(f"{id(request.prompt)} {text}\n")
        self._rows[key] = _Row(request, sampling, random.Random(request.seed))

    def tell_progress(self, call: Callable[[], None]) -> None:
        self._tell = call

    def step(self) -> list[tuple[str, Completion]]:
        time.sleep(self._pause_s)
        finished = []
        for key, row in [*self._rows.items()][: self.capacity]:
            text = text_of(row.request.prompt)
            if "kill" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            while "hang" in text:
                signal.pause()
            if "long" in text:
                self._take_long()
            if "raise" in text:
                raise RuntimeError(f"CUDA error: an illegal memory access was encountered, at {text}")
            weights = [1 + (len(text) * 7 + sum(row.tokens) + place) % 5 for place in range(len(LETTERS))]
            (token,) = row.rng.choices(range(len(LETTERS)), weights)
            row.tokens.append(token)
            row.logprobs.append(weights[token] / sum(weights))
            if token == END or len(row.tokens) == row.sampling.max_tokens:
                finished.append((key, self._completion(row)))
        self.abort([key for key, _ in finished])
        return finished

    def _take_long(self) -> None:
        for _ in range(10):
            time.sleep(0.3)
            self._tell()

    def _start_helper(self) -> None:
        """As an engine on several GPUs: another process, in a session of its own, and memory that both share."""
        context = multiprocessing.get_context("spawn")
        self._shared = SharedMemory(create=True, size=1000), context.Semaphore()
        context.Process(target=use_memory, args=(self._shared[0].name, self._shared[1])).start()

    @staticmethod
    def _completion(row: _Row) -> Completion:
        words = "".join(LETTERS[token] for token in row.tokens)
        prompt = tuple(text_of(row.request.prompt).encode())
        reason: Any = "stop" if row.tokens[-1] == END else "length"
        return Completion(prompt, tuple(row.tokens), tuple(row.logprobs), words, reason)

    def abort(self, keys: Collection[str]) -> None:
        for key in keys:
            self._rows.pop(key, None)

    def close(self) -> None:
        self._rows.clear()


def use_memory(name: str, _: object) -> None:
    os.setsid()
    memory = SharedMemory(name)
    time.sleep(600)
    memory.close()


@dataclass(frozen=True)
class OpenLetters:
    """Opens a `LettersEngine` in a worker, or fails at it.

    Attributes
    ----------
    notes
        Folder: each worker writes down what it was asked, in a file named by its process.
    needs
        Notches that it takes until there is memory enough.
    fault, crash
        Raise a fault of the user's, or an error, with this text.
    once
        A file: only the first worker that can create it fails, in these ways.
    open_s
        How long opening takes.
    """

    capacity: int = 4
    pause_s: float = 0.0
    notes: Path | None = None
    needs: int = 0
    fault: str = ""
    crash: str = ""
    once: Path | None = None
    open_s: float = 0.0

    def __call__(self, notches: int) -> LettersEngine:
        time.sleep(self.open_s)
        if self.once is None or _create(self.once):
            if notches < self.needs:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.fault:
                raise ValueError(self.fault)
            if self.crash:
                raise RuntimeError(self.crash)
        return LettersEngine(self.capacity, self.pause_s, self.notes)


def _create(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
