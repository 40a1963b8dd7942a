"""Asking the listener: chunks, a cache, and no score that nobody gave (L11–L13).

What cannot be scored is a `ScoreError`, to be left out and counted: an item that the listener refuses (an image that is
no image), and the items of a call whose retries ended. When no listener answers at all, that is `ServiceUnavailable`.
"""

from __future__ import annotations

import math
import os
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpc_rl.config.clients import ClientConfig
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.calling import ServiceClient, ServiceRefused

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
        rng: random.Random | None = None,
    ) -> None:
        options = config.services.listener.client
        if url := os.environ.get("LISTENER_URL"):
            options = ClientConfig.model_validate({**options.model_dump(), "url": url})
        token_from = "by the caller" if token else "in LISTENER_TOKEN"
        token = token or os.environ.get("LISTENER_TOKEN")
        self._service = ServiceClient(ws.service_dir("listener"), options, token=token, token_from=token_from, rng=rng)
        self._cache: OrderedDict[ScoreRequest, ScoreResult] = OrderedDict()
        self._lock = threading.Lock()

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
        ServiceRefused
            When the token is wrong, or what answers is no listener.
        """
        asked = list(dict.fromkeys(items))
        answers: dict[ScoreRequest, ScoreResult | ScoreError] = {
            item: known for item in asked if (known := self._recall(item)) is not None
        }
        missing = [item for item in asked if item not in answers]
        scores = self._service.ask("/batch_score", missing, _payload, self._read, ScoreError)
        answers.update(zip(missing, scores, strict=True))
        return [answers[item] for item in items]

    def _read(self, chunk: Sequence[ScoreRequest], said: Any) -> list[ScoreResult | ScoreError]:
        try:
            scores = [_read_score(item, result) for item, result in zip(chunk, said["results"], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceRefused(f"what answers is no listener: {str(said)[:200]}") from error
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


def _payload(chunk: Sequence[ScoreRequest]) -> dict[str, Any]:
    return {"batch": [{"candidate_paths": list(item.candidates), "question": item.question} for item in chunk]}


def _read_score(item: ScoreRequest, result: dict[str, Any]) -> ScoreResult | ScoreError:
    if "error" in result:
        return ScoreError(str(result["error"]))
    probabilities = tuple(math.nan if p is None else float(p) for p in result["yes_probabilities"])
    if len(probabilities) != len(item.candidates):
        return ScoreError(f"the listener gave {len(probabilities)} scores for {len(item.candidates)} candidates")
    return ScoreResult(probabilities, int(result["predicted_index"]))
