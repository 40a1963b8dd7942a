"""Asking the listener: chunks, a cache, and no score that nobody gave (L11–L13).

What cannot be scored is a `ScoreError`, to be left out and counted: an item that the listener refuses (an image that is
no image), and the items of a call whose retries ended. When no listener answers at all, that is `ServiceUnavailable`.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.services import ClientConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.calling import CallFailed, ServiceClient, ServiceRefused, ServiceUnavailable

__all__ = ["ListenerClient", "ScoreError", "ScoreRequest", "ScoreResult", "ServiceRefused", "ServiceUnavailable"]

PARALLEL_CALLS = 4
CACHE_ENTRIES = 200_000


@dataclass(frozen=True)
class ScoreRequest:
    """One question about K candidate images, paths relative to the image root, in the order of the game."""

    question: str
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class ScoreResult:
    """P(yes) of each candidate (NaN where the model gave none), and the one picked: -1 for a tie or a NaN."""

    yes_probabilities: tuple[float, ...]
    predicted_index: int


@dataclass(frozen=True)
class ScoreError:
    """Why a request has no score. Its sample is left out, never counted as wrong (L11)."""

    message: str


class ListenerClient:
    """Asks the listener which candidate a description means.

    Parameters
    ----------
    ws, config
        The run. `services.listener.client` has the settings. With a `url` there, or in the variable LISTENER_URL of
        this very job, that server is used and none is looked up.
    token
        For a server of another run. None = the variable LISTENER_TOKEN, else the run's own token.
    """

    def __init__(
        self,
        ws: Workspace,
        config: LewisConfig,
        *,
        token: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._options = config.services.listener.client
        if url := os.environ.get("LISTENER_URL"):
            self._options = ClientConfig.model_validate({**self._options.model_dump(), "url": url})
        token = token or os.environ.get("LISTENER_TOKEN")
        self._service = ServiceClient(ws.service_dir("listener"), self._options, token=token, sleep=sleep, rng=rng)
        self._sleep = sleep
        self._cache: OrderedDict[ScoreRequest, ScoreResult] = OrderedDict()
        self._lock = threading.Lock()
        self._next_call = 0.0

    def __enter__(self) -> ListenerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._service.close()

    def score(self, items: Sequence[ScoreRequest]) -> list[ScoreResult | ScoreError]:
        """Scores of `items`, in order. What was asked before, or twice here, is asked once (L13).

        Raises
        ------
        ServiceUnavailable
            When no server answered until the deadline; answers that came before are kept for the next call.
        """
        answers: dict[ScoreRequest, ScoreResult | ScoreError] = {}
        asked = list(dict.fromkeys(items))
        for item in asked:
            if (known := self._recall(item)) is not None:
                answers[item] = known
        missing = [item for item in asked if item not in answers]
        size = self._options.chunk_size
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        pool = ThreadPoolExecutor(max(1, min(PARALLEL_CALLS, len(chunks))), thread_name_prefix="listener-client")
        try:
            for chunk, scores in zip(chunks, pool.map(self._ask, chunks), strict=True):
                answers.update(zip(chunk, scores, strict=True))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [answers[item] for item in items]

    def _ask(self, chunk: Sequence[ScoreRequest]) -> list[ScoreResult | ScoreError]:
        self._wait_for_turn()
        batch = [{"candidate_paths": list(item.candidates), "question": item.question, "topk": 1} for item in chunk]
        try:
            said = self._service.post("/batch_score", {"batch": batch})
        except CallFailed as error:
            if error.too_large and len(chunk) > 1:
                half = len(chunk) // 2
                return self._ask(chunk[:half]) + self._ask(chunk[half:])
            return [ScoreError(str(error))] * len(chunk)
        results = said.get("results") if isinstance(said, dict) else None
        if not isinstance(results, list) or len(results) != len(chunk):
            raise ServiceRefused(f"what answers is no listener: {str(said)[:200]}")
        scores = [_read_score(item, result) for item, result in zip(chunk, results, strict=True)]
        with self._lock:
            for item, score in zip(chunk, scores, strict=True):
                if isinstance(score, ScoreResult):
                    self._cache[item] = score
            while len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return scores

    def _recall(self, item: ScoreRequest) -> ScoreResult | None:
        with self._lock:
            if item in self._cache:
                self._cache.move_to_end(item)
            return self._cache.get(item)

    def _wait_for_turn(self) -> None:
        """Keep `chunk_delay_s` between calls."""
        if not self._options.chunk_delay_s:
            return
        with self._lock:
            wait_s = max(0.0, self._next_call - time.monotonic())
            self._next_call = time.monotonic() + wait_s + self._options.chunk_delay_s
        self._sleep(wait_s)


def _read_score(item: ScoreRequest, result: dict[str, Any]) -> ScoreResult | ScoreError:
    if "error" in result:
        return ScoreError(str(result["error"]))
    probabilities = tuple(math.nan if p is None else float(p) for p in result["yes_probabilities"])
    if len(probabilities) != len(item.candidates):
        return ScoreError(f"the listener gave {len(probabilities)} scores for {len(item.candidates)} candidates")
    return ScoreResult(probabilities, int(result["predicted_index"]))
