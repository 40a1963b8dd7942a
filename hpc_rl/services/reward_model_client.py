"""Asking a reward model or the verifier: a cache, and no score that nobody gave (A1, L11).

What cannot be scored is a `ScoreError`, to be left out and counted. When no server answers at all, that is
`ServiceUnavailable`.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from hpc_rl.config.schema import Config
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.calling import ServiceClient, ServiceRefused
from hpc_rl.services.client import ScoreError

CACHE_ENTRIES = 200_000
"""Scores that are kept: some 40 MB, as texts are kept by their hash."""


@dataclass(frozen=True)
class Candidates:
    """A question and n solutions of it."""

    question: str
    solutions: tuple[str, ...]


Score = float | ScoreError


class RewardModelClient:
    """Asks for the scores of solutions, `chunk_size` of them in one call.

    Parameters
    ----------
    ws, config
        The run. `services.NAME.client` has the settings; with a `url` there that server is used.
    name
        Which of the two is asked.
    weights_hash
        Weights that the scores must be of: servers of others are left out. "" = whatever is served.
    token
        For a server of another run. None = the run's own.
    """

    def __init__(
        self,
        ws: Workspace,
        config: Config,
        name: Literal["reward_model", "verifier"] = "reward_model",
        *,
        weights_hash: str = "",
        token: str | None = None,
        rng: random.Random | None = None,
    ) -> None:
        options = config.services.reward_model if name == "reward_model" else config.services.verifier
        self._name = name
        self._service = ServiceClient(
            ws.service_dir(name), options.client, token=token, weights_hash=weights_hash, rng=rng
        )
        self._cache: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> RewardModelClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._service.close()

    def score(self, items: Sequence[Candidates]) -> list[list[Score]]:
        """Raw logits of shape (B, n), in order. What was asked before, or twice here, is asked once.

        Raises
        ------
        ServiceUnavailable
            When no server answered until the deadline; answers that came before are kept for the next call.
        ServiceRefused
            When the token is wrong, or what answers is no such service.
        """
        pairs = list(dict.fromkeys((item.question, text) for item in items for text in item.solutions))
        scores: dict[tuple[str, str], Score] = {
            pair: known for pair in pairs if (known := self._recall(pair)) is not None
        }
        missing = [pair for pair in pairs if pair not in scores]
        found = self._service.ask("/batch_score", missing, _payload, self._read, ScoreError)
        scores.update(zip(missing, found, strict=True))
        return [[scores[item.question, text] for text in item.solutions] for item in items]

    def _read(self, chunk: Sequence[tuple[str, str]], said: Any) -> list[Score]:
        try:
            scores = [
                _score(value, why)
                for result in said["results"]
                for value, why in zip(result["scores"], result["errors"], strict=True)
            ]
            read = list(zip(chunk, scores, strict=True))
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceRefused(f"what answers is no {self._name}: {str(said)[:200]}") from error
        with self._lock:
            for pair, score in read:
                if isinstance(score, float):
                    self._cache[_key(pair)] = score
            while len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return scores

    def _recall(self, pair: tuple[str, str]) -> float | None:
        key = _key(pair)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)


def _payload(chunk: Sequence[tuple[str, str]]) -> dict[str, Any]:
    games = groupby(chunk, key=lambda pair: pair[0])
    return {"batch": [{"question": question, "solutions": [text for _, text in pairs]} for question, pairs in games]}


def _key(pair: tuple[str, str]) -> bytes:
    return hashlib.sha256(json.dumps(pair).encode()).digest()


def _score(value: float | None, why: str | None) -> Score:
    return ScoreError(str(why)) if value is None else float(value)
