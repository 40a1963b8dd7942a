"""What OpenAPI says about every service: the token, the refusals, and the routes that the server itself answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpc_rl.config.services import MOST_REQUEST_ITEMS
from hpc_rl.services.invalid_body import refuse_invalid_body

DESCRIPTION = """Every route but `/health` wants the run's token, which lies in the workspace, in
`services/<service>/token`. What is refused says why in `detail`, and changes nothing: with 408, 429 and 503, ask
again."""

TOKEN = {"type": "http", "scheme": "bearer", "description": "What the file `services/<service>/token` holds."}


MAX_FIELDS = 64

Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(max_length=MOST_REQUEST_ITEMS, fail_fast=True)]
"""A list in a body, read as far as its first fault: a fault for each of a million items would hold up everybody."""


class Body(BaseModel):
    """What a client sends. A field that is not documented is refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, sent: Any) -> Any:
        if isinstance(sent, dict) and len(sent) > MAX_FIELDS:  # each that is not documented would be a fault
            raise ValueError(f"more than {MAX_FIELDS} fields")
        return sent


class Answer(BaseModel):
    """What a client gets."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Refusal(Answer):
    """Why there is no answer."""

    detail: str


class Fault(Answer):
    """What is wrong with one place in the body."""

    loc: list[str | int]
    """The way there: `["body", "batch", 0, "question"]`."""
    msg: str
    type: str


class InvalidBody(Answer):
    """Why the body cannot be answered: the reason, or each place that is not as documented."""

    detail: str | list[Fault]


def _header(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": {"type": kind}}


_RETRY = {"Retry-After": _header("Seconds until there may be room.", "integer")}

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the Host header is missing or malformed, or the body is no text", "model": Refusal},
    401: {
        "description": "no token, or the wrong one",
        "model": Refusal,
        "headers": {"WWW-Authenticate": _header("Bearer", "string")},
    },
    408: {"description": "the body took too long to arrive", "model": Refusal},
    413: {"description": "the body or the batch is too large: send fewer items at once", "model": Refusal},
    421: {"description": "the Host header names another server", "model": Refusal},
    422: {"description": "the body is not as documented, or its only item cannot be answered", "model": InvalidBody},
    429: {
        "description": "this client has too many items waiting: try again after Retry-After",
        "model": Refusal,
        "headers": _RETRY,
    },
    500: {"description": "the model failed", "model": Refusal},
    503: {
        "description": "busy or leaving: try again after Retry-After, or ask another replica",
        "model": Refusal,
        "headers": _RETRY,
    },
}
"""What a route may answer besides its result."""


def _some(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: REFUSALS[status] for status in statuses}


class Alive(Answer):
    """What anybody may know."""

    status: Literal["ok", "draining"]
    """draining: it finishes what it has and then leaves."""
    nonce: str
    """Drawn anew by each server process. The record in `services/<service>/` has it too."""


class Ready(Answer):
    """It takes requests now."""

    status: Literal["ready"]


class Health(Alive):
    """What those with the token may know. Each service has figures of its own besides these."""

    model_config = ConfigDict(extra="allow")

    service: str
    weights_hash: str
    """Which weights it serves."""
    waiting_items: int
    counters: dict[str, float]
    """What it has done since it started."""


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["security"] = [{"token": []}]
            document.setdefault("components", {})["securitySchemes"] = {"token": TOKEN}
        assert self.openapi_schema is not None
        return self.openapi_schema


def new_app(name: str, summary: str | None = None) -> FastAPI:
    """An application for a service's routes; `hpc_rl.services.server` puts its guard around it.

    Parameters
    ----------
    name
        Of the service.
    summary
        What it is for, in a line.
    """
    app = _App(
        title=f"hpc_rl {name}",
        version="1",
        summary=summary,
        description=DESCRIPTION,
        generate_unique_id_function=lambda route: route.name,
        exception_handlers={RequestValidationError: refuse_invalid_body},
    )

    @app.get("/health", responses=_some(400, 421), openapi_extra={"security": [{}, {"token": []}]})
    async def health() -> Health | Alive:
        """Say that it lives; with the token, how it does."""
        raise AssertionError("the guard answers this")

    @app.get("/ready", responses=_some(400, 401, 421, 503))
    async def ready() -> Ready:
        """Say whether a request would be taken now: not while it leaves, its queue is full, or its model fails."""
        raise AssertionError("the guard answers this")

    text = {
        "description": "Name, labels and value, a line each",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }

    @app.get("/metrics", responses={200: text, **_some(400, 401, 421)}, response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus, in its text format."""
        raise AssertionError("the guard answers this")

    return app
