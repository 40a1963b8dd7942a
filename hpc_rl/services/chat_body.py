"""The bodies of OpenAI's chat completions, as far as a local teacher goes; any other field is refused, not ignored.

Reference: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue

from hpc_rl.services.openapi import REFUSALS, Answer, Body, InvalidBody, Listed, Refusal

MAX_STOPS = 4
EXAMPLE: dict[str, JsonValue] = {
    "model": "judge-8b",
    "messages": [{"role": "user", "content": "Is 2 + 3 = 5? Answer yes or no."}],
    "max_tokens": 8,
    "temperature": 0,
}
ANSWERED: dict[str, JsonValue] = {
    "id": "chatcmpl-5f0c",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "judge-8b",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 21, "completion_tokens": 2, "total_tokens": 23},
}


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class MessageBody(Body):
    """One message of the chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Listed[TextPart]
    """Text; parts are put one behind the other. Images are not read."""

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(Body):
    """A schema that the answer follows."""

    name: str
    """Of no effect."""
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None
    """The answer follows the schema with true and with false."""


class ResponseFormat(Body):
    """What the answer is; other than text only with `services.teacher.engine: vllm`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    """With `type: json_schema` only."""

    @property
    def schema_text(self) -> str | None:
        """The schema as JSON; None: any text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return json.dumps(self.json_schema.schema_, sort_keys=True)
        return '{"type": "object"}' if self.type == "json_object" else None


Stop = Annotated[str, Field(min_length=1)]


class ChatBody(Body):
    """A chat for the model to go on with."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: str
    """The name that `/v1/models` gives."""
    messages: Annotated[Listed[MessageBody], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer, in tokens. null = `services.teacher.max_tokens`, or less where the context ends before."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`; one of them."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """0 is greedy. null = 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Only the likeliest tokens that together have this probability. null = 1."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """The same seed gives the same answer. null = one drawn at random."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    """The answer ends before the first of these texts."""
    response_format: ResponseFormat | None = None
    """null = text."""
    n: Literal[1] | None = None
    """Answers to one request."""
    stream: Literal[False] | None = None
    """Answers come whole."""

    @property
    def longest(self) -> int | None:
        """The longest answer under either name."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class MessageAnswer(Answer):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(Answer):
    """The answer."""

    index: Literal[0] = 0
    message: MessageAnswer
    finish_reason: Literal["stop", "length"]
    """length: it was cut off at the longest length allowed."""


class Usage(Answer):
    """Tokens that the model has read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(Answer):
    """A chat completion."""

    model_config = ConfigDict(json_schema_extra={"examples": [ANSWERED]})

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[Choice]
    usage: Usage


class ModelAnswer(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hpc_rl"
    max_model_len: int
    """Longest prompt and answer together, in tokens."""


class ModelsAnswer(Answer):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class OpenAIError(Answer):
    """A refusal as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    """The field that is at fault."""
    code: None


class ChatRefusal(Refusal):
    """Why there is no answer."""

    error: OpenAIError | None = None
    """Not there where the server refuses before it reads the body."""


class InvalidChat(InvalidBody):
    """Why the chat cannot be answered."""

    error: OpenAIError | None = None


CHAT_REFUSALS: dict[int | str, dict[str, Any]] = {
    **{status: {**said, "model": InvalidChat if status == 422 else ChatRefusal} for status, said in REFUSALS.items()},
    404: {"description": "there is no such model here", "model": ChatRefusal},
}
"""What the chat route may answer besides its result."""


def openai_error(status: int, detail: Any, message: str, param: str | None = None) -> dict[str, Any]:
    """A refusal as OpenAI's clients read it (`error`), and as all of our services give it (`detail`)."""
    kinds = {404: "not_found_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    error = {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": None}
    return {"detail": detail, "error": error}
