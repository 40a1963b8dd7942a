"""An engine that says what it is: what is really used, and what opening it cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from hpc_rl.engines.base import Completion, Engine, LongSteps, Prompt, Request, Sampling


class DescribedEngine(Engine, Protocol):
    """An engine, and what opening it was like.

    Attributes
    ----------
    kind
        `vllm`, `transformers` or `pool`: what it really is.
    description
        What is really used, for manifests and reports: which engine and why, its memory, how it was loaded.
    loading
        Seconds by part: import, staging, merging, engine (reading the weights included).
    """

    @property
    def kind(self) -> str: ...

    @property
    def description(self) -> Mapping[str, object]: ...

    @property
    def loading(self) -> Mapping[str, float]: ...


class OpenedEngine:
    """An engine of this process, described. Closing it gives back what the node and the workspace lent."""

    def __init__(
        self,
        engine: Engine,
        kind: str,
        description: Mapping[str, object],
        loading: Mapping[str, float],
        close: Callable[[], None],
    ) -> None:
        self._engine, self._close = engine, close
        self.kind, self.description, self.loading = kind, description, loading

    @property
    def capacity(self) -> int:
        """See `Engine.capacity`."""
        return self._engine.capacity

    @property
    def unfinished(self) -> int:
        """See `Engine.unfinished`."""
        return self._engine.unfinished

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """See `Engine.expect`."""
        return self._engine.expect(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """See `Engine.submit`."""
        self._engine.submit(key, request, sampling)

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`."""
        return self._engine.step()

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`."""
        self._engine.abort(keys)

    def tell_progress(self, call: Callable[[], None]) -> None:
        """See `LongSteps.tell_progress`; where the engine's steps are short ones, there is nothing to tell."""
        if isinstance(self._engine, LongSteps):
            self._engine.tell_progress(call)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()
        self._close()
