"""The listener's HTTP service: which candidate does a description mean (L1–L4)?

    POST /score        {candidate_paths, question, topk}  → {yes_probabilities, predicted_index}
                       {candidate_images, question, topk}, the images themselves in base64: the same
    POST /batch_score  {"batch": [ … ]}                   → {"results": [ … ], "took": seconds}
    GET  /health

`predicted_index` is -1 for a tie and where a P(yes) is no number (null in `yes_probabilities`): neither ever counts as
right. An item that cannot be scored has `{"error": …}` in place of its result and costs the others nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import FastAPI, HTTPException, Request
from pydantic import ConfigDict, Field, JsonValue, model_validator

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.modeling import ListenerConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.data.lewis import image_root
from hpc_rl.engines.yes_no_prompts import Unscorable
from hpc_rl.grading.lewis import decide
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.frame import CannotServe, Desk, Service
from hpc_rl.services.images import MAX_PATH_CHARACTERS, ImageSource, InlineImage
from hpc_rl.services.openapi import REFUSALS, Answer, Body, Listed, new_app
from hpc_rl.services.pair_scorer import Judge, Pair, PairScorer

MAX_CANDIDATES = 256
MAX_QUESTION_CHARACTERS = 20_000


GAME: dict[str, JsonValue] = {
    "candidate_paths": ["/path/to/img1.jpg", "/path/to/img2.jpg"],
    "question": "Does the description match the dog in the image?",
    "topk": 1,
}
PICKED: dict[str, JsonValue] = {"yes_probabilities": [0.95, 0.23], "predicted_index": 0}
EITHER: list[JsonValue] = [{"required": ["candidate_paths"]}, {"required": ["candidate_images"]}]


class ScoreBody(Body):
    """One game: a question about each candidate image."""

    model_config = ConfigDict(json_schema_extra={"examples": [GAME], "oneOf": EITHER})

    candidate_paths: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS)]],
        Field(min_length=1, max_length=MAX_CANDIDATES, default_factory=list),
    ]
    """Images beneath the image root, relative to it; absolute paths are taken where they lie beneath it."""
    candidate_images: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_CANDIDATES, default_factory=list),
    ]
    """In place of `candidate_paths`: the image files themselves, in base64 (RFC 4648, section 4; no `data:` URL)."""
    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS)]
    """Asked about each of them."""
    topk: Annotated[int, Field(ge=1)] = 1
    """With more than 1 the answer has `top_indices` too: that many candidates by falling P(yes)."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.candidate_paths) == bool(self.candidate_images):
            raise ValueError("one of candidate_paths and candidate_images is needed, and not both")
        return self

    @property
    def candidates(self) -> list[ImageSource]:
        """The images, in either form."""
        return [*self.candidate_paths, *map(InlineImage, self.candidate_images)]


class BatchBody(Body):
    """Many games."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"batch": [GAME]}]})

    batch: Listed[ScoreBody]


class ScoreAnswer(Answer):
    """What the listener makes of one game."""

    model_config = ConfigDict(json_schema_extra={"examples": [PICKED]})

    yes_probabilities: list[float | None]
    """P(yes) of each candidate, in order; null where it is no number."""
    predicted_index: int
    """The candidate with the largest P(yes); -1 for a tie and where one is null."""


class TopAnswer(ScoreAnswer):
    """The answer to a game with `topk` above 1."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**PICKED, "top_indices": [0, 1]}]})

    top_indices: list[int]
    """Candidates by falling P(yes), at most `topk`; those without a number last."""


class ErrorAnswer(Answer):
    """Why one game has no answer."""

    error: str


class BatchAnswer(Answer):
    """Answers in the order of the batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": [PICKED], "took": 0.234}]})

    results: list[TopAnswer | ScoreAnswer | ErrorAnswer]
    took: float
    """Seconds, the wait for a turn included."""


ListenerDesk = Desk[Pair, "float | Unscorable"]


def open_service(ws: Workspace, config: Config, round: int, options: ListenerServiceConfig) -> Service:
    """The run's listener; the same in every round.

    Raises
    ------
    CannotServe
        When the run has none.
    """
    from hpc_rl.engines.weights import weights_hash
    from hpc_rl.services.images import ImageRoots

    if not isinstance(config, LewisConfig):
        raise CannotServe(
            f"a run of the recipe {config.recipe} has no listener, so there is nothing to serve: `lewis` has one"
        )
    scorer = PairScorer(
        open_judge(config.listener, options),
        ImageRoots([image_root(ws, config.data.image_root)], options),
        cache_bytes=options.image_cache_mb << 20,
    )
    about = {"model": config.listener.path, "engine": options.engine}
    return service_of(scorer, options, weights_hash(Path(config.listener.path)), about)


def open_judge(model: ListenerConfig, options: ListenerServiceConfig) -> Judge:
    """The model in the engine that the config names. One that cannot be loaded is an error."""
    if options.engine == "vllm":
        from hpc_rl.engines.yes_no_vllm import YesNoVllm

        return YesNoVllm(
            model.path,
            dtype=model.dtype,
            min_pixels=model.min_pixels,
            max_pixels=model.max_pixels,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
            variables=model.chat_template_kwargs,
        )
    from hpc_rl.engines.yes_no import YesNoModel

    return YesNoModel(
        model.path,
        dtype=model.dtype,
        attention=model.attn_implementation,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        max_model_len=options.max_model_len,
        max_pass_tokens=options.max_pass_tokens,
        variables=model.chat_template_kwargs,
    )


def service_of(
    scorer: PairScorer, options: ListenerServiceConfig, weights_hash: str = "", about: Mapping[str, Any] | None = None
) -> Service:
    """The service around a scorer."""
    desk: ListenerDesk = Desk(scorer, options)
    app = create_app(desk)
    return Service(
        "listener",
        app,
        desk.batcher,
        weights_hash,
        about or {},
        scorer.tokens,
        details=lambda: figures(scorer),
        close=scorer.close,
    )


def create_app(desk: ListenerDesk) -> FastAPI:
    """The listener's routes."""
    app = new_app("listener", "Which of the candidate images does a description mean?")

    async def answer(request: Request, batch: Sequence[ScoreBody]) -> list[TopAnswer | ScoreAnswer | ErrorAnswer]:
        pairs = [Pair(image, body.question) for body in batch for image in body.candidates]
        rest = iter(await desk.ask(request, pairs))
        return [_answer(body, [next(rest) for _ in body.candidates]) for body in batch]

    @app.post("/score", responses=REFUSALS)
    async def score(request: Request, body: ScoreBody) -> TopAnswer | ScoreAnswer:
        """Score one game."""
        (result,) = await answer(request, [body])
        if isinstance(result, ErrorAnswer):
            raise HTTPException(422, result.error)
        return result

    @app.post("/batch_score", responses=REFUSALS)
    async def batch_score(request: Request, body: BatchBody) -> BatchAnswer:
        """Score many games; an item that cannot be scored has an error in its place."""
        started = time.perf_counter()
        results = await answer(request, body.batch)
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


def figures(scorer: PairScorer) -> dict[str, Any]:
    """What `/health` tells of the scorer's caches."""
    cache = {"hits": scorer.cache.hits, "misses": scorer.cache.misses}
    answers = {"hits": scorer.answers.hits, "misses": scorer.answers.misses, "kept": len(scorer.answers)}
    return {"image_cache": cache, "answer_cache": answers}
