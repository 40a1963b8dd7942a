"""How a body that is not as documented is refused: where it is wrong and why, and never what was in it.

FastAPI's own answer repeats what was sent: paths, megabytes of images, and numbers and characters that no JSON answer
can hold (NaN, lone surrogates), so that it would fail itself.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

MAX_FAULTS = 20
MAX_NAME_CHARACTERS = 100


async def refuse_invalid_body(request: Request, error: Exception) -> Response:
    """422 with the first faults: `{"detail": [{"loc", "msg", "type"}, …]}`, ASCII only."""
    assert isinstance(error, RequestValidationError)
    return Response(json.dumps({"detail": faults_of(error)}), 422, media_type="application/json")


def faults_of(error: RequestValidationError) -> list[dict[str, Any]]:
    """The first faults: where, what, and of which kind."""
    return [_fault(fault) for fault in error.errors()[:MAX_FAULTS]]


def _fault(fault: dict[str, Any]) -> dict[str, Any]:
    way = [place if isinstance(place, int) else place[:MAX_NAME_CHARACTERS] for place in fault["loc"]]
    return {"loc": way, "msg": fault["msg"], "type": fault["type"]}
