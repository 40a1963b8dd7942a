"""A local teacher's HTTP service (S2): enough of OpenAI's API for the openai package, our own client, and curl.

    POST /v1/chat/completions  {model, messages, …}  → {choices: [{message: {content}, finish_reason}], usage, …}
    GET  /v1/models                                  → {data: [{id, …}]}
    GET  /health

The run's token is the API key. Refusals have both `error`, as OpenAI's clients expect it, and our services' `detail`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from hpc_rl.config.schema import Config
from hpc_rl.config.services import TeacherServiceConfig
from hpc_rl.engines import base
from hpc_rl.engines.base import Engine, Prompt, Sampling, generate_each
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.chat_body import (
    CHAT_REFUSALS,
    ChatAnswer,
    ChatBody,
    Choice,
    MessageAnswer,
    ModelAnswer,
    ModelsAnswer,
    Usage,
    openai_error,
)
from hpc_rl.services.frame import CannotServe, Desk, Service, TokenCounts
from hpc_rl.services.invalid_body import faults_of
from hpc_rl.services.openapi import REFUSALS, new_app

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Chat:
    """One chat to go on with; `max_tokens` None: the service's own limit."""

    messages: tuple[Mapping[str, str], ...]
    seed: int
    temperature: float
    top_p: float
    max_tokens: int | None
    json_schema: str | None
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What the model said."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Unsaid:
    """Why a chat has no answer."""

    reason: str


class Reader(Protocol):
    """What the service needs to know before it asks; `hpc_rl.engines.chat.ChatReader` is one."""

    max_tokens: int

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a prompt; ValueError for messages that the model cannot read."""


class Answers(Protocol):
    """What answers chats: `Writer` with a model, `hpc_rl.services.rules.RuleWriter` without one."""

    @property
    def reader(self) -> Reader:
        """What it needs to know of a chat before it answers."""

    @property
    def tokens(self) -> TokenCounts:
        """Read and written so far."""

    def __call__(self, chats: Sequence[Chat]) -> list[Said | Unsaid]:
        """The answer to each, in order."""


class Writer:
    """Answers a batch of chats. Not for several threads: engines run one batch at a time.

    Parameters
    ----------
    engine, reader
        The model, and what it can be asked.
    max_tokens
        Longest answer to a chat that names no length.
    """

    def __init__(self, engine: Engine, reader: Reader, max_tokens: int) -> None:
        self._engine, self.reader, self._max_tokens = engine, reader, max_tokens
        self.tokens = TokenCounts()

    def __call__(self, chats: Sequence[Chat]) -> list[Said | Unsaid]:
        """The answer to each, in order."""
        asked: dict[int, tuple[base.Request, Sampling]] = {}
        answers: dict[int, Said | Unsaid] = {}
        for place, chat in enumerate(chats):
            try:
                asked[place] = base.Request(Prompt(chat.messages), chat.seed), self._sampling(chat)
            except ValueError as error:
                answers[place] = Unsaid(str(error))
        for place, made in zip(asked, generate_each(self._engine, list(asked.values())), strict=True):
            answers[place] = Unsaid(str(made)) if isinstance(made, ValueError) else self._said(made, chats[place])
        return [answers[place] for place in range(len(chats))]

    def _sampling(self, chat: Chat) -> Sampling:
        length, limit = self.reader.length(chat.messages), self.reader.max_tokens
        longest = chat.max_tokens or max(1, min(self._max_tokens, limit - length))
        if length + longest > limit:
            raise ValueError(
                f"the prompt has {length} tokens and the answer may have {longest}; at most {limit} together"
            )
        top_p = chat.top_p if chat.temperature > 0 else 1.0
        return Sampling(chat.temperature, longest, top_p, chat.json_schema, chat.stops)

    def _said(self, made: base.Completion, chat: Chat) -> Said:
        self.tokens.prompt += len(made.prompt_token_ids)
        self.tokens.completion += len(made.token_ids)
        return _cut(made, chat.stops)


def _cut(made: base.Completion, stops: Sequence[str]) -> Said:
    text, reason = until_stop(made.text, made.finish_reason, stops)
    return Said(text, reason, len(made.prompt_token_ids), len(made.token_ids))


def until_stop(text: str, reason: FinishReason, stops: Sequence[str]) -> tuple[str, FinishReason]:
    """The text up to the first of the stops, which is left out as OpenAI does; it counts as written."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(ends)], "stop") if ends else (text, reason)


TeacherDesk = Desk[Chat, "Said | Unsaid"]


def open_service(ws: Workspace, config: Config, round: int, options: TeacherServiceConfig) -> Service:
    """`services.teacher.model`, or its rules; the same in every round."""
    return open_named("teacher", options)


def open_named(name: str, options: TeacherServiceConfig) -> Service:
    """The service `name` with what its config section serves.

    Raises
    ------
    CannotServe
        When the section names no model, or one that cannot chat; or rules that are not there.
    """
    if options.engine == "rules":
        from hpc_rl.services.rules import open_rules

        return service_of(name, options, *open_rules(name, options), {"engine": "rules", "rules": options.rules})
    if options.model is None:
        raise CannotServe(
            f"services.{name}.model is null, so there is nothing to serve. Set it to the folder of a chat model, or "
            f"use an endpoint that already runs: services.{name}.client.url"
        )
    from hpc_rl.engines.chat import ChatReader
    from hpc_rl.engines.weights import weights_hash

    try:
        reader = ChatReader(options.model, options.max_model_len)
        engine = _open_engine(options.model, options, reader.max_tokens)
    except (OSError, ValueError) as error:
        raise CannotServe(f"services.{name}.model cannot be served: {error}") from error
    about = {"model": options.model, "engine": options.engine, "dtype": options.dtype, "max_tokens": reader.max_tokens}
    writer = Writer(engine, reader, options.max_tokens)
    return service_of(name, options, writer, weights_hash(Path(options.model)), about)


def _open_engine(path: str, options: TeacherServiceConfig, max_model_len: int) -> Engine:
    if options.engine == "transformers":
        from hpc_rl.engines.transformers_engine import TransformersEngine

        return TransformersEngine(path, dtype=options.dtype, attention=options.attn_implementation)
    from hpc_rl.engines.vllm_engine import VllmEngine

    return VllmEngine(
        path,
        dtype=options.dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        batch_invariant=False,
    )


def service_of(
    name: str, options: TeacherServiceConfig, writer: Answers, weights_hash: str, about: Mapping[str, Any]
) -> Service:
    """The service around what answers; `options` say what is served."""
    model = ModelAnswer(id=str(options.served_model), created=int(time.time()), max_model_len=writer.reader.max_tokens)
    desk: TeacherDesk = Desk(writer, options, workers=1)
    return Service(name, create_app(name, desk, model), desk.batcher, weights_hash, about, writer.tokens)


def create_app(name: str, desk: TeacherDesk, model: ModelAnswer) -> FastAPI:
    """The teacher's routes."""
    app = new_app(name, "A chat model, by as much of OpenAI's API as a grader needs.")
    app.exception_handlers[HTTPException] = _refuse
    app.exception_handlers[RequestValidationError] = _refuse_body

    @app.post("/v1/chat/completions", responses=CHAT_REFUSALS)
    async def create_chat_completion(request: Request, body: ChatBody) -> ChatAnswer:
        """Go on with a chat."""
        if body.model != model.id:
            raise HTTPException(404, f"there is no such model here; {model.id} is served")
        if body.max_tokens and body.max_completion_tokens:
            raise HTTPException(
                422, "max_tokens and max_completion_tokens are two names of one field: send one of them"
            )
        form = body.response_format
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise HTTPException(422, "response_format.json_schema goes with type json_schema, and only with it")
        (said,) = await desk.ask(request, [_chat(body)])
        if isinstance(said, Unsaid):
            raise HTTPException(422, said.reason)
        return ChatAnswer(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=model.id,
            choices=[Choice(message=MessageAnswer(content=said.text), finish_reason=said.finish_reason)],
            usage=Usage(
                prompt_tokens=said.prompt_tokens,
                completion_tokens=said.completion_tokens,
                total_tokens=said.prompt_tokens + said.completion_tokens,
            ),
        )

    some: dict[int | str, dict[str, Any]] = {status: REFUSALS[status] for status in (400, 401, 421, 503)}

    @app.get("/v1/models", responses=some)
    async def list_models() -> ModelsAnswer:
        """Say which model is served."""
        return ModelsAnswer(data=[model])

    return app


def _chat(body: ChatBody) -> Chat:
    return Chat(
        messages=tuple({"role": message.role, "content": message.text} for message in body.messages),
        seed=secrets.randbits(31) if body.seed is None else body.seed,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        max_tokens=body.longest,
        json_schema=body.response_format.schema_text if body.response_format else None,
        stops=body.stops,
    )


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = openai_error(error.status_code, error.detail, str(error.detail))
    return Response(json.dumps(content), error.status_code, error.headers, media_type="application/json")


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = faults_of(error)
    param = ".".join(str(place) for place in faults[0]["loc"][1:])
    content = openai_error(422, faults, f"{param}: {faults[0]['msg']}", param)
    return Response(json.dumps(content), 422, media_type="application/json")
