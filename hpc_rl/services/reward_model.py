"""The HTTP service of a model that scores solutions: a reward model (A2), or the verifier of a prover (V).

    POST /score        {question, solutions: [n]}  → {scores: [n], errors: [n]}
    POST /batch_score  {"batch": [ … ]}            → {"results": [ … ], "took": seconds}
    GET  /health

A score is the model's raw logit. Each solution stands for itself: either it has a score and its error is null, or its
score is null and its error says why (too long, a control token in it, a logit that is no number). B questions with n
solutions each are B results with n scores each, in order (A1).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, JsonValue

from hpc_rl.config.schema import Config
from hpc_rl.config.services import RewardModelServiceConfig
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.frame import CannotServe, Desk, Service, TokenCounts
from hpc_rl.services.openapi import REFUSALS, Answer, Body, Listed, new_app


@dataclass(frozen=True)
class Solution:
    """One solution of a question."""

    question: str
    text: str


@dataclass(frozen=True)
class Unscored:
    """Why a solution has no score."""

    reason: str


class Model(Protocol):
    """What the service needs of a model; `hpc_rl.engines.reward_model.RewardModel` is one."""

    def encode(self, question: str, solution: str) -> list[int]:
        """Token ids; ValueError when this cannot be scored."""

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One number per row of token ids, NaN where there is none."""


@dataclass(frozen=True)
class Scorer:
    """Turns a batch of solutions into scores, and counts the tokens that its model reads."""

    model: Model
    tokens: TokenCounts = field(default_factory=TokenCounts)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, solutions: Sequence[Solution]) -> list[float | Unscored]:
        """Score or reason of each, in order; the same solution twice is scored once."""
        answers: dict[Solution, float | Unscored] = {}
        rows: dict[Solution, list[int]] = {}
        for solution in dict.fromkeys(solutions):
            try:
                rows[solution] = self.model.encode(solution.question, solution.text)
            except ValueError as error:
                answers[solution] = Unscored(str(error))
        for solution, score in zip(rows, self.model.scores(list(rows.values())), strict=True):
            answers[solution] = score if math.isfinite(score) else Unscored("the model's score is no finite number")
        with self._lock:
            self.tokens.prompt += sum(map(len, rows.values()))
        return [answers[solution] for solution in solutions]


QUESTION: dict[str, JsonValue] = {"question": "What is 2 + 3?", "solutions": ["2 + 3 = \\boxed{5}", "6"]}
SCORES: dict[str, JsonValue] = {"scores": [4.125, None], "errors": [None, "too long"]}


class ScoreBody(Body):
    """A question and solutions of it."""

    model_config = ConfigDict(json_schema_extra={"examples": [QUESTION]})

    question: Annotated[str, Field(min_length=1)]
    """What the user asks."""
    solutions: Annotated[Listed[str], Field(min_length=1)]
    """What the assistant may have answered; each is scored by itself."""


class BatchBody(Body):
    """Many questions."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"batch": [QUESTION]}]})

    batch: Listed[ScoreBody]


class ScoreAnswer(Answer):
    """Scores of one question's solutions."""

    model_config = ConfigDict(json_schema_extra={"examples": [SCORES]})

    scores: list[float | None]
    """The raw logit of each solution, in order; null where there is none."""
    errors: list[str | None]
    """Why a solution has no score; null where it has one."""


class BatchAnswer(Answer):
    """Answers in the order of the batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": [SCORES], "took": 0.25}]})

    results: list[ScoreAnswer]
    took: float
    """Seconds, the wait for a turn included."""


RewardModelDesk = Desk[Solution, "float | Unscored"]


def open_service(ws: Workspace, config: Config, round: int, options: RewardModelServiceConfig) -> Service:
    """`services.reward_model.model`; the same in every round."""
    return open_named("reward_model", options)


def open_named(name: str, options: RewardModelServiceConfig) -> Service:
    """The service `name` with the model of its config section.

    Raises
    ------
    CannotServe
        When the section names no model, or one that cannot score.
    """
    if options.model is None:
        raise CannotServe(
            f"services.{name}.model is null, so there is nothing to serve. Set it to the folder of a "
            "sequence-classification model with one output"
        )
    from hpc_rl.engines.reward_model import open_reward_model
    from hpc_rl.engines.weights import weights_hash

    try:
        model = open_reward_model(options.model, options)
    except (OSError, ValueError) as error:
        raise CannotServe(f"services.{name}.model cannot be served: {error}") from error
    about = {"model": options.model, "engine": options.engine, "dtype": options.dtype, "max_tokens": model.max_tokens}
    return service_of(name, model, options, weights_hash(Path(options.model)), about)


def service_of(
    name: str, model: Model, options: RewardModelServiceConfig, weights_hash: str, about: Mapping[str, Any]
) -> Service:
    """The service around a model."""
    scorer = Scorer(model)
    desk: RewardModelDesk = Desk(scorer, options, workers=1 if options.engine == "vllm" else None)
    return Service(name, create_app(name, desk), desk.batcher, weights_hash, about, scorer.tokens)


def create_app(name: str, desk: RewardModelDesk) -> FastAPI:
    """The routes."""
    app = new_app(name, "What a model thinks of solutions, as raw logits.")

    async def answer(request: Request, batch: Sequence[ScoreBody]) -> list[ScoreAnswer]:
        solutions = [Solution(body.question, text) for body in batch for text in body.solutions]
        rest = iter(await desk.ask(request, solutions))
        return [_answer([next(rest) for _ in body.solutions]) for body in batch]

    @app.post("/score", responses=REFUSALS)
    async def score(request: Request, body: ScoreBody) -> ScoreAnswer:
        """Score solutions of one question."""
        (result,) = await answer(request, [body])
        return result

    @app.post("/batch_score", responses=REFUSALS)
    async def batch_score(request: Request, body: BatchBody) -> BatchAnswer:
        """Score solutions of many questions."""
        started = time.perf_counter()
        results = await answer(request, body.batch)
        return BatchAnswer(results=results, took=round(time.perf_counter() - started, 6))

    return app


def _answer(found: Sequence[float | Unscored]) -> ScoreAnswer:
    return ScoreAnswer(
        scores=[None if isinstance(score, Unscored) else score for score in found],
        errors=[score.reason if isinstance(score, Unscored) else None for score in found],
    )
