"""What an answer means: its text, or the JSON in it, checked against the schema that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry

from hpc_rl.teachers.cache import Answer

_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
QUOTED_CHARACTERS = 300


class BadReply(ValueError):
    """An answer that is not what was asked for; the message tells the teacher what is wrong with it."""


def check_schema(schema: Mapping[str, Any]) -> None:
    """ValueError for what is no JSON schema."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}, at {error.json_path}") from error
    outside = [reference for reference in _references(schema) if not reference.startswith("#")]
    if outside:
        raise ValueError(f"the schema refers to {outside[0]!r}; only references into itself (#/$defs/…) are followed")


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)


def read(answer: Answer, schema: Mapping[str, Any] | None) -> Any:
    """The value that an answer holds; None where no schema was given and any text will do.

    The JSON may stand alone, after thoughts in `<think>`, or in a fence of three backticks.

    Raises
    ------
    BadReply
        When there is no text, or it is no JSON, or does not follow the schema.
    """
    if not answer.text.strip():
        raise BadReply(f"the answer is empty (finish_reason {answer.finish_reason})")
    if schema is None:
        return None
    try:
        value = _load(_THOUGHTS.sub("", answer.text))
    except (ValueError, RecursionError) as error:
        cut = ", and it was cut off at the longest length allowed" if answer.finish_reason == "length" else ""
        raise BadReply(f"the answer is not valid JSON ({error}){cut}") from error
    problem = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(value))  # that fetches nothing
    if problem is not None:
        where = "" if problem.json_path == "$" else f", at {problem.json_path}"
        raise BadReply(f"the JSON does not follow the schema: {problem.message[:QUOTED_CHARACTERS]}{where}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\\ud800" alone is no character, and no file takes it
        raise BadReply(f"the JSON holds half a character: {error}") from error
    return value


def check(value: Any, own: Callable[[Any], str] | None) -> None:
    """BadReply where the question's own check finds something wrong."""
    if own is not None and (wrong := own(value)):
        raise BadReply(wrong)


def _load(text: str) -> Any:
    fenced = None if text.lstrip().startswith(("{", "[")) else _FENCED.search(text)
    return json.loads(fenced[1] if fenced else text, parse_constant=_no_such_number)


def _no_such_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
