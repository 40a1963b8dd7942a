"""pydantic's errors in the words of the config: file and line, field, what was expected, which keys there are."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from hpc_rl.config.base import Fault
from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config, nearest
from hpc_rl.config.source import KeyPath, Tree
from hpc_rl.config.walk import describe, field_at, field_path, section_at


def problems_of(error: ValidationError, cls: type[Config], tree: Tree) -> list[Problem]:
    """One problem per field at fault, in the order of the schema."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        for problem in _problems(dict(detail), cls, tree):
            problems.setdefault(f"{problem.field} {problem.where}", problem)
    return list(problems.values())


def _problems(detail: dict[str, Any], cls: type[Config], tree: Tree) -> list[Problem]:
    at: KeyPath = tuple(detail["loc"])
    if detail["type"] == "faults":
        return [_fault(at, fault, tree) for fault in detail["ctx"]["faults"]]
    if detail["type"] == "extra_forbidden":
        return [_unknown_key(at, cls, tree)]
    key = field_path(cls, at)
    dotted, where = ".".join(map(str, key)), tree.place(key)
    if detail["type"] == "missing":
        info = field_at(cls, key)
        expected = describe(info) if info else ""
        return [Problem(dotted, "missing", expected, "set it in the YAML or with --set", where)]
    info = field_at(cls, key)
    what = f"{_value(tree.data, key)!r}"
    if detail["type"] in ("value_error", "string_pattern_mismatch", "string_too_long"):
        what = f"{what}: {detail['msg'].removeprefix('Value error, ')}"
        return [Problem(dotted, what, where=where)]
    return [Problem(dotted, what, describe(info) if info else detail["msg"], where=where)]


def _fault(at: KeyPath, fault: Fault, tree: Tree) -> Problem:
    key = (*at, *fault.field)
    return Problem(".".join(map(str, key)), fault.what, fault.expected, fault.way_out, tree.place(key))


def _unknown_key(at: KeyPath, cls: type[Config], tree: Tree) -> Problem:
    section = section_at(cls, at[:-1])
    valid = list(section.model_fields) if section else []
    what = "unknown key"
    close = nearest(str(at[-1]), valid)
    return Problem(".".join(map(str, at)), what, f"one of {', '.join(valid)}", close, tree.place(at))


def _value(data: Any, key: KeyPath) -> Any:
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
