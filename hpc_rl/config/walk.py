"""Finding one's way in the schema by key path: sections, types as users read them, fields that hold paths."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from hpc_rl.config.base import PathMark, Section
from hpc_rl.config.source import KeyPath


def section_at(root: type[Section], path: KeyPath) -> type[Section] | None:
    """The section class at a key path; None where there is none (a value, a free mapping, a wrong path)."""
    annotation: Any = root
    for key in path:
        annotation = _step(annotation, key)
    return _section(annotation)


def field_at(root: type[Section], path: KeyPath) -> FieldInfo | None:
    """The field at a key path; None within free mappings and lists and at wrong paths."""
    parent = section_at(root, path[:-1]) if path else None
    return parent.model_fields.get(str(path[-1])) if parent else None


def field_path(root: type[Section], path: KeyPath) -> KeyPath:
    """The longest part of a key path that leads to a field or to a key of a mapping: without indices and union arms."""
    annotation: Any = root
    for length, key in enumerate(path):
        annotation = _step(annotation, key)
        if annotation is None:
            return path[:length] if length else path
        if _section(annotation) is None and _values(annotation) is None:
            return path[: length + 1]
    return path


def split_dotted(root: type[Section], dotted: str, names: Sequence[str] | None) -> KeyPath:
    """A dotted key as a key path. Stage names have dots themselves: `stages.grade.listener.tasks`."""
    parts = dotted.split(".")
    if len(parts) > 2 and parts[0] == "stages":
        joined = f"{parts[1]}.{parts[2]}"
        stage = section_at(root, ("stages", parts[1]))
        if joined in (names or ()) or (names is None and stage and parts[2] not in stage.model_fields):
            parts[1:3] = [joined]
    return tuple(parts)


def path_fields(annotation: Any, value: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str, PathMark]]:
    """All texts in `value` that sit in fields for paths."""
    mark = _mark(annotation)
    section, items = _section(annotation), _items(annotation)
    if mark and isinstance(value, str):
        yield at, value, mark
    elif isinstance(value, Mapping):
        for key, child in value.items():
            step = _step(annotation, key)
            if section is not None or step is not None:
                yield from path_fields(step, child, (*at, key))
    elif items is not None and isinstance(value, list):
        for index, child in enumerate(value):
            yield from path_fields(items, child, (*at, index))


def describe(info: FieldInfo) -> str:
    """A field's type as users read it: `int ≥ 1`, `auto | slurm | local | debug`, `path or null`."""
    text = _describe(info.annotation)
    if any(isinstance(m, PathMark) for m in info.metadata):
        text = text.replace("text", "path")
    return text + _limits(info.metadata)


def _limits(metadata: Sequence[Any]) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    found = [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in signs if hasattr(m, name)]
    for m in metadata:
        if isinstance(m, FieldInfo):
            found += [part for part in [_limits(m.metadata).strip()] if part]
    return " " + ", ".join(found) if found else ""


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    names = {int: "int", float: "number", str: "text", bool: "true | false", type(None): "null", Any: "anything"}
    if origin is Annotated:
        text = _describe(args[0])
        if any(isinstance(m, PathMark) for m in args[1:]):
            text = "path"
        return text + _limits(args[1:])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        items = args[:1] if args[-1] is Ellipsis else args
        inner = ", ".join(dict.fromkeys(_describe(a) for a in items))
        return f"list of {inner}" if args[-1] is Ellipsis else f"list of {len(items)} × {inner}"
    if origin is dict:
        inner = _describe(args[1])
        return "mapping" if inner == "anything" else f"mapping of {inner}"
    if _section(annotation):
        return "section"
    return names.get(annotation, "path" if getattr(annotation, "__name__", "") == "Path" else str(annotation))


def _arms(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _arms(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(arm for arm in get_args(annotation) if arm is not type(None))
    return (annotation,)


def _section(annotation: Any) -> type[Section] | None:
    for arm in _arms(annotation):
        if isinstance(arm, type) and issubclass(arm, Section):
            return arm
    return None


def _values(annotation: Any) -> Any:
    return next((get_args(arm)[1] for arm in _arms(annotation) if get_origin(arm) is dict), None)


def _items(annotation: Any) -> Any:
    return next((get_args(arm)[0] for arm in _arms(annotation) if get_origin(arm) is tuple), None)


def _step(annotation: Any, key: str | int) -> Any:
    section = _section(annotation)
    if section is None:
        return _values(annotation)
    info = section.model_fields.get(str(key))
    return Annotated[(info.annotation, *info.metadata)] if info and info.metadata else info.annotation if info else None


def _mark(annotation: Any) -> PathMark | None:
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        return next((m for m in metadata if isinstance(m, PathMark)), None) or _mark(base)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((mark for arm in get_args(annotation) if (mark := _mark(arm))), None)
    return None
