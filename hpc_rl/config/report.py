"""pydantic's errors in the words of the config: file and line, field, what was expected, which keys there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from hpc_rl.config.base import Fault
from hpc_rl.config.errors import Problem
from hpc_rl.config.legacy import PROSETTING
from hpc_rl.config.schema import Config, nearest
from hpc_rl.config.source import KeyPath, Tree
from hpc_rl.config.walk import describe, field_at, field_path, section_at

LONGEST_VALUE = 100
"""Characters of a wrong value that a message shows."""


def problems_of(error: ValidationError, cls: type[Config], tree: Tree) -> list[Problem]:
    """One problem per field at fault: what files set, by file and line, then what else did, then what is missing."""
    found = [problem for detail in error.errors(include_url=False) for problem in _problems(dict(detail), cls, tree)]
    # pydantic looks no further than a stage's wrong fields; that the stage does not exist is news too.
    stages = tree.data.get("stages")
    names = list(stages) if isinstance(stages, Mapping) else []
    found += [_fault(("stages",), fault, tree) for fault in cls.unknown_stages(names)]
    return sorted({(p.field, p.where): p for p in reversed(found)}.values(), key=_order)


def _order(problem: Problem) -> tuple[int, str, int, str]:
    file, _, line = problem.where.rpartition(":")
    kind = 0 if line.isdigit() else 1 if problem.where else 2
    return kind, file, int(line) if kind == 0 else 0, problem.field


def _problems(detail: dict[str, Any], cls: type[Config], tree: Tree) -> list[Problem]:
    at: KeyPath = tuple(detail["loc"])
    if detail["type"] == "faults":
        return [_fault(at, fault, tree) for fault in detail["ctx"]["faults"]]
    if detail["type"] == "extra_forbidden":
        return [_unknown_key(at, cls, tree)]
    key = field_path(cls, at)
    dotted, where = ".".join(map(str, key)), tree.place(key)
    if detail["type"] == "missing" and key == at:
        return [Problem(dotted, "missing", _expected(cls, key), "set it in the YAML or with --set", where)]
    value = json.dumps(_value(tree.data, key), ensure_ascii=False, default=str)
    shown = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"
    if detail["type"] == "value_error":
        return [Problem(dotted, detail["msg"].removeprefix("Value error, "), where=where)]
    return [Problem(dotted, shown, _expected(cls, key), where=where)]


def _expected(cls: type[Config], key: KeyPath) -> str:
    section = section_at(cls, key)
    if section is not None:
        required = [name for name, info in section.model_fields.items() if info.is_required()]
        return f"a section with {', '.join(required)}" if required else "a section"
    info = field_at(cls, key) or field_at(cls, key[:-1])
    assert info is not None, key
    return describe(info)


def _fault(at: KeyPath, fault: Fault, tree: Tree) -> Problem:
    key = (*at, *fault.field)
    return Problem(".".join(map(str, key)), fault.what, fault.expected, fault.way_out, tree.place(key))


def _unknown_key(at: KeyPath, cls: type[Config], tree: Tree) -> Problem:
    section = section_at(cls, at[:-1])
    assert section is not None, at
    valid = list(section.model_fields)
    way_out = nearest(str(at[-1]), valid)
    if len(at) == 1 and at[0] in cls.legacy_keys:  # files have been translated: this one came by --set
        way_out = f"here it is {' and '.join(cls.legacy_keys[str(at[0])].fields) or 'nothing: leave it out'}"
    elif len(at) == 1 and at[0] in PROSETTING:
        way_out = "recipe: prosetting knows this key of the seed's training_config.json"
    return Problem(".".join(map(str, at)), "unknown key", f"one of {', '.join(valid)}", way_out, tree.place(at))


def _value(data: Any, key: KeyPath) -> Any:
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
