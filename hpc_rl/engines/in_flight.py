"""What an engine made of a prompt, kept as long as a request with that prompt is in flight.

The requests of a group share their prompt, so it is rendered, and its images are opened and processed, once. Where
that takes long, as with photos, it is done in threads beside the engine's loop for prompts that are known beforehand.
Prompts count as the same if their messages are, and if their images are the same files or objects: copies that came
through a pipe share too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from PIL import Image

from hpc_rl.engines.base import Prompt

Made = TypeVar("Made")

PromptKey = tuple[str, tuple[Path | int, ...], int | None]
"""Messages, images, tokens to keep."""

_GIVEN = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is one number for each level of nesting
THREADS = max(1, min(4, int(_GIVEN or len(os.sched_getaffinity(0)) - 1)))
"""Images that are decoded at once: a photo of 12 megapixels takes a tenth of a second. Workers share the CPUs so."""
WORTH_A_THREAD_S = 0.02
"""A prompt that takes less is read when it is taken: a thread would take the interpreter from the engine's loop, again
and again. What that costs: `python -m benchmarks.sampling --cases images`, with 0 here and without. Seconds."""
KEPT = 32
"""Prompts that were to come next and do not: so many are kept, as retries have only come before them."""


@dataclass
class _Entry(Generic[Made]):
    prompt: Prompt  # holds the images, so that no other object has their ids
    made: Made
    requests: int


class InFlight(Generic[Made]):
    """The prompts in flight, and those that come next. For one thread.

    Parameters
    ----------
    make
        What to do with a prompt that is new here, and its decoded images; what it raises, `take` raises. It is called
        in several threads, one at a time: neither tokenizers nor image processors are for more.
    worth_s
        Prompts that usually take less are not read in threads.
    """

    def __init__(
        self, make: Callable[[Prompt, Sequence[Image.Image]], Made], worth_s: float = WORTH_A_THREAD_S
    ) -> None:
        self._make, self._making = make, Lock()
        self._worth_s = worth_s
        self._usual_s = math.inf  # the first ones come when the engine has nothing to do
        self._entries: dict[PromptKey, _Entry[Made]] = {}
        self._expected: dict[PromptKey, tuple[Prompt, Future[Made]]] = {}
        self._next: dict[int, tuple[Prompt, PromptKey]] = {}  # by the prompt's id: keys of long texts take long to make
        self._threads = ThreadPoolExecutor(THREADS, "prompts")

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """Begin to read these, several at a time; how many of the first of them can be taken without much of a wait."""
        self._next = {id(prompt): self._next.get(id(prompt)) or (prompt, _key(prompt)) for prompt in prompts}
        if self._usual_s < self._worth_s:
            return len(prompts)
        wanted = {key: prompt for prompt, key in self._next.values()}
        new = [key for key in wanted if key not in self._entries and key not in self._expected]
        if new and (new[0] == next(iter(wanted)) or 2 * len(new) >= len(wanted)):
            self._expected |= {key: (wanted[key], self._threads.submit(self._read, wanted[key])) for key in new}
        stale = [key for key in self._expected if key not in wanted]
        self._forget(stale[: max(0, len(stale) - KEPT)])
        return sum(1 for _ in takewhile(self._is_there, (self._next[id(prompt)][1] for prompt in prompts)))

    def take(self, prompt: Prompt) -> tuple[PromptKey, Made]:
        """What was made of the prompt, for one request; to be given back by its key when that ends."""
        _, key = self._next.get(id(prompt)) or (prompt, _key(prompt))
        entry = self._entries.get(key)
        if entry is None:
            known, reading = self._expected.pop(key, (prompt, None))
            made = self._read(prompt) if reading is None else reading.result()
            entry = self._entries[key] = _Entry(known, made, 0)
        entry.requests += 1
        return key, entry.made

    def give_back(self, key: PromptKey) -> None:
        """A request has ended."""
        entry = self._entries[key]
        entry.requests -= 1
        if not entry.requests:
            del self._entries[key]

    def close(self) -> None:
        """Stop reading."""
        self._forget(list(self._expected))
        self._threads.shutdown()

    def __len__(self) -> int:
        """How many different prompts are kept."""
        return len(self._entries)

    def _is_there(self, key: PromptKey) -> bool:
        return key in self._entries or (key in self._expected and self._expected[key][1].done())

    def _forget(self, keys: Sequence[PromptKey]) -> None:
        for key in keys:
            self._expected.pop(key)[1].cancel()

    def _read(self, prompt: Prompt) -> Made:
        began = time.monotonic()
        images = prompt.open_images()
        opening_s = time.monotonic() - began
        with self._making:
            began = time.monotonic()
            made = self._make(prompt, images)
            took_s = opening_s + time.monotonic() - began
            self._usual_s = took_s if math.isinf(self._usual_s) else 0.9 * self._usual_s + 0.1 * took_s
        return made


def _key(prompt: Prompt) -> PromptKey:
    images = tuple(image if isinstance(image, Path) else id(image) for image in prompt.images)
    return repr(prompt.messages), images, prompt.keep_tokens
