"""An engine without a model: what it answers is a function's result, at the next step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling


class Answering(ABC):
    """Submitting is all that its requests have in common with those of a real one."""

    capacity = 8

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Request, Sampling]] = {}

    @abstractmethod
    def answer(self, request: Request, sampling: Sampling) -> Completion:
        """Its completion."""

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def expect(self, prompts: Sequence[Prompt]) -> int:
        return len(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        self._waiting[key] = request, sampling

    def step(self) -> list[tuple[str, Completion]]:
        waiting, self._waiting = self._waiting, {}
        return [(key, self.answer(*asked)) for key, asked in waiting.items()]

    def abort(self, keys: Collection[str]) -> None:
        for key in keys:
            self._waiting.pop(key, None)

    def close(self) -> None:
        self._waiting.clear()
