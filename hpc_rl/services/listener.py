"""The listener's HTTP service: which candidate does a description mean (L1–L4)?

    POST /score        {candidate_paths, question, topk}  → {yes_probabilities, predicted_index}
    POST /batch_score  {"batch": [ … ]}                   → {"results": [ … ], "took": seconds}
    GET  /health

`predicted_index` is -1 for a tie and where a P(yes) is no number (null in `yes_probabilities`): neither ever counts as
right. An item that cannot be scored has `{"error": …}` in place of its result and costs the others nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from hpc_rl.grading.lewis import decide
from hpc_rl.services.batching import Batcher, ModelFailed, Overloaded
from hpc_rl.services.images import MAX_PATH_CHARACTERS
from hpc_rl.services.scorer import Pair, Scorer, Unscorable
from hpc_rl.services.server import RETRY_AFTER_S

MAX_CANDIDATES = 256
MAX_QUESTION_CHARACTERS = 20_000


class ScoreBody(BaseModel):
    """One game: a question about each candidate image."""

    model_config = ConfigDict(extra="forbid")

    candidate_paths: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS)]],
        Field(min_length=1, max_length=MAX_CANDIDATES),
    ]
    """Images beneath the image root, relative to it; absolute paths are taken where they lie beneath it."""
    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS)]
    """Asked about each of them."""
    topk: Annotated[int, Field(ge=1)] = 1
    """With more than 1 the answer has `top_indices` too: that many candidates by falling P(yes)."""


class BatchBody(BaseModel):
    """Many games."""

    model_config = ConfigDict(extra="forbid")

    batch: list[ScoreBody]


class ScoreAnswer(BaseModel):
    """What the listener makes of one game."""

    yes_probabilities: list[float | None]
    """P(yes) of each candidate, in order; null where it is no number."""
    predicted_index: int
    """The candidate with the largest P(yes); -1 for a tie and where one is null."""


class TopAnswer(ScoreAnswer):
    """The answer to a game with `topk` above 1."""

    top_indices: list[int]
    """Candidates by falling P(yes), at most `topk`; those without a number last."""


class ErrorAnswer(BaseModel):
    """Why one game has no answer."""

    error: str


class BatchAnswer(BaseModel):
    """Answers in the order of the batch."""

    results: list[TopAnswer | ScoreAnswer | ErrorAnswer]
    took: float
    """Seconds, the wait for a turn included."""


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body is no JSON"},
    401: {"description": "no token, or the wrong one"},
    413: {"description": "the body or the batch is too large: send fewer items at once"},
    422: {"description": "the body is not as documented, or (/score) the game cannot be scored"},
    500: {"description": "the model failed"},
    503: {"description": "busy or leaving: try again after Retry-After, or ask another replica"},
}
ListenerBatcher = Batcher[Pair, "float | Unscorable"]


def create_app(batcher: ListenerBatcher, *, max_pairs: int, acquire_timeout_s: float) -> FastAPI:
    """The listener's routes; `hpc_rl.services.server` puts its guard around them.

    Parameters
    ----------
    batcher
        Runs a `Scorer`.
    max_pairs
        Most image–question pairs in one request.
    acquire_timeout_s
        Longest wait of a request for its turn (INFERENCE_ACQUIRE_TIMEOUT).
    """
    app = FastAPI(title="hpc_rl listener", version="1")

    async def answer(batch: Sequence[ScoreBody]) -> list[TopAnswer | ScoreAnswer | ErrorAnswer]:
        pairs = [Pair(path, body.question) for body in batch for path in body.candidate_paths]
        if len(pairs) > max_pairs:
            raise HTTPException(413, f"{len(pairs)} image-question pairs in one request; at most {max_pairs}")
        try:
            scores = await batcher.submit(pairs, acquire_timeout_s)
        except Overloaded as error:
            raise HTTPException(503, f"busy: {error}", headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        except ModelFailed as error:
            raise HTTPException(500, f"the model failed: {error}") from error
        rest = iter(scores)
        return [_answer(body, [next(rest) for _ in body.candidate_paths]) for body in batch]

    @app.post("/score", responses=REFUSALS)
    async def score(body: ScoreBody) -> TopAnswer | ScoreAnswer:
        """Score one game."""
        (result,) = await answer([body])
        if isinstance(result, ErrorAnswer):
            raise HTTPException(422, result.error)
        return result

    @app.post("/batch_score", responses=REFUSALS)
    async def batch_score(body: BatchBody) -> BatchAnswer:
        """Score many games; an item that cannot be scored has an error in its place."""
        started = time.perf_counter()
        results = await answer(body.batch)
        return BatchAnswer(results=results, took=round(time.perf_counter() - started, 6))

    return app


def _answer(body: ScoreBody, scores: Sequence[float | Unscorable]) -> TopAnswer | ScoreAnswer | ErrorAnswer:
    for place, score in enumerate(scores):
        if isinstance(score, Unscorable):
            return ErrorAnswer(error=f"candidate {place}: {score.reason}")
    numbers = [score for score in scores if isinstance(score, float)]
    said = [None if math.isnan(p) else p for p in numbers]
    if body.topk == 1:
        return ScoreAnswer(yes_probabilities=said, predicted_index=decide(numbers))
    order = sorted(range(len(numbers)), key=lambda i: (math.isnan(numbers[i]), -numbers[i]))
    return TopAnswer(yes_probabilities=said, predicted_index=decide(numbers), top_indices=order[: body.topk])


def describe(batcher: ListenerBatcher, scorer: Scorer, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `/health` tells those who have the token."""
    counters = {name: round(value, 3) for name, value in asdict(batcher.counters).items()}
    cache = {"hits": scorer.cache.hits, "misses": scorer.cache.misses}
    answers = {"hits": scorer.answers.hits, "misses": scorer.answers.misses, "kept": len(scorer.answers)}
    caches = {"image_cache": cache, "answer_cache": answers}
    return {**about, "waiting_pairs": batcher.waiting, "counters": counters, **caches}
