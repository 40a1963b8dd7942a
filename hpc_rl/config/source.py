"""YAML files as data that remembers who set each field: file and line, through `extends`, environment and `--set`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.config.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with `5e-7` as the number it is in YAML 1.2 (in 1.1 it is a text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Tree:
    """Nested mappings, and for each key path the place that set it."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Who set a field: the place of the longest key path above it that has one, or an empty text."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return ""

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Put `value` at `path`, making the mappings above it. Mappings are merged into mappings."""
        nested: Any = value
        for key in reversed(path):
            nested = {key: nested}
        places: dict[KeyPath, str] = {path: place}
        at: Any = self.data
        for length, key in enumerate(path, 1):
            at = at.get(str(key)) if isinstance(at, Mapping) else None
            if not isinstance(at, Mapping):  # not there yet, or no mapping and about to be replaced
                places[path[:length]] = place
        self.merge(Tree(nested, places))

    def merge(self, over: Tree) -> None:
        """Lay `over` on top: mappings merge key by key, anything else (lists, null too) replaces what was there."""
        _merge(self.data, over.data, (), self.places, over.places)


def _merge(
    base: dict[str, Any],
    over: Mapping[str, Any],
    at: KeyPath,
    places: dict[KeyPath, str],
    over_places: Mapping[KeyPath, str],
) -> None:
    for key, value in over.items():
        path = (*at, key)
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        if not both:
            for old in [p for p in places if p[: len(path)] == path]:
                del places[old]
        if path in over_places:
            places[path] = over_places[path]
        if isinstance(value, Mapping):
            if not both:
                base[key] = {}
            _merge(base[key], value, path, places, over_places)
        else:
            base[key] = value
            places.update({p: place for p, place in over_places.items() if p[: len(path)] == path})


def read_yaml(
    path: Path,
    extended_by: tuple[Path, ...] = (),
    asked_at: str = "",
    *,
    each: Callable[[Tree], None] | None = None,
) -> Tree:
    """One YAML file with everything it extends beneath it.

    `extends` is a file name or a list of them, relative to the file that says so; later ones win over earlier ones, and
    the file itself over all. `each` may change the tree of every file before it is merged with others.

    Raises
    ------
    ConfigError
        Missing files, cycles, syntax errors, duplicated keys: all that are found.
    """
    shown = _shown(path)
    if path.resolve() in extended_by:
        circle = " → ".join(_shown(p) for p in (*extended_by, path.resolve()))
        raise ConfigError([Problem("extends", f"the files extend each other: {circle}", where=asked_at)])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        field_name = "extends" if extended_by else ""
        way_out = "`extends` is relative to the file that says it" if extended_by else "check the path"
        raise ConfigError([Problem(field_name, f"cannot read {shown}: {reason}", "", way_out, asked_at)]) from None
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON is YAML but for tabs, which it has only between values
    own = parse_yaml(text, shown)
    problems: list[Problem] = []
    tree = Tree()
    place = own.places.pop(("extends",), shown)
    for name in _names(own.data.pop("extends", []), place):
        try:
            tree.merge(read_yaml(path.parent / name, (*extended_by, path.resolve()), place, each=each))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if each is not None:
        each(own)
    tree.merge(own)
    return tree


def _names(value: Any, place: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError([Problem("extends", f"{value!r}", "a file name or a list of file names", where=place)])
    return names


def _shown(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def parse_yaml(text: str, name: str) -> Tree:
    """One YAML document, a mapping; `name` stands for the file in places and messages."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Tree()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([Problem("", "the file is no mapping", "`key: value` lines", where=f"{name}:1")])
        tree = Tree(places={})
        problems: list[Problem] = []
        tree.data = _construct(loader, node, (), name, tree.places, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError([Problem("", f"YAML: {error.problem or error.context}", where=where)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem("", f"YAML: {error}", where=name)]) from None
    finally:
        loader.dispose()
    if problems:
        raise ConfigError(problems)
    return tree


def _construct(
    loader: _Loader, node: yaml.Node, at: KeyPath, name: str, places: dict[KeyPath, str], problems: list[Problem]
) -> Any:
    if isinstance(node, yaml.MappingNode):
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = _key(loader, key_node), key_node.start_mark.line + 1
            if key in first:
                what = f"the key is there twice, first in line {first[key]}"
                problems.append(Problem(_dotted((*at, key)), what, "each key once", where=f"{name}:{line}"))
            first[key] = line
        loader.flatten_mapping(node)
        result = {}
        for key_node, value_node in node.value:
            key = _key(loader, key_node)
            places[(*at, key)] = f"{name}:{key_node.start_mark.line + 1}"
            result[key] = _construct(loader, value_node, (*at, key), name, places, problems)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            places[(*at, index)] = f"{name}:{child.start_mark.line + 1}"
        return [
            _construct(loader, child, (*at, index), name, places, problems) for index, child in enumerate(node.value)
        ]
    return loader.construct_object(node)  # type: ignore[no-untyped-call]


def _key(loader: _Loader, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a key must be a plain text", problem_mark=node.start_mark)
    return str(node.value)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def parse_value(text: str) -> Any:
    """A value as `--set` takes it: YAML, `3`, `[a, b]`, `{r: 16}`, `null`, `text`."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
