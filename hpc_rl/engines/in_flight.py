"""What an engine made of a prompt, kept as long as a request with that prompt is in flight.

The requests of a group share their prompt, so it is rendered, and its images are opened and processed, once. Prompts
count as the same if their messages are, and if their images are the same files or objects: copies that came through a
pipe share too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hpc_rl.engines.base import Prompt

Made = TypeVar("Made")

PromptKey = tuple[str, tuple[Path | int, ...], int | None]
"""Messages, images, tokens to keep."""


@dataclass
class _Entry(Generic[Made]):
    prompt: Prompt  # holds the images, so that no other object has their ids
    made: Made
    requests: int


class InFlight(Generic[Made]):
    """The prompts in flight.

    Parameters
    ----------
    make
        What to do with a prompt that is new here; what it raises, `take` raises.
    """

    def __init__(self, make: Callable[[Prompt], Made]) -> None:
        self._make = make
        self._entries: dict[PromptKey, _Entry[Made]] = {}

    def take(self, prompt: Prompt) -> tuple[PromptKey, Made]:
        """What was made of the prompt, for one request; to be given back by its key when that ends."""
        images = tuple(image if isinstance(image, Path) else id(image) for image in prompt.images)
        key = (repr(prompt.messages), images, prompt.keep_tokens)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(prompt, self._make(prompt), 0)
        entry.requests += 1
        return key, entry.made

    def give_back(self, key: PromptKey) -> None:
        """A request has ended."""
        entry = self._entries[key]
        entry.requests -= 1
        if not entry.requests:
            del self._entries[key]

    def __len__(self) -> int:
        """How many different prompts are kept."""
        return len(self._entries)
