"""Keys of a seed's own config file that a recipe's YAML may have too: the fields that they set here.

They stand at the top level of any file, so `extends: [training_config.json]` takes a seed's file in. A file is
translated before it is merged with others: later files win, whichever spelling they use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpc_rl.config.errors import Problem
from hpc_rl.config.source import KeyPath, Tree


class Unreadable(Exception):
    """A value that a key cannot have; the text says what it may be."""


@dataclass(frozen=True)
class LegacyKey:
    """What a key sets.

    Attributes
    ----------
    fields
        Dotted fields; none where there is nothing to set here.
    read
        From the key's value to those of the fields. Raises `Unreadable`.
    why
        Said beside the fields, or in their place.
    """

    fields: tuple[str, ...]
    read: Callable[[Any], tuple[Any, ...]]
    why: str = ""


@dataclass(frozen=True)
class Translated:
    """A key that a file has: where it stands there, and what it sets."""

    key: str
    place: str
    values: Mapping[str, Any]
    why: str

    def said(self, merged: Tree) -> str:
        """A line for people. `merged` is the tree that came of all files and variables: another may have won."""
        fields = []
        for field, value in self.values.items():
            winner = merged.place(_path(field))
            fields.append(f"{field} = {value}" + (f" (overridden by {winner})" if winner != self.place else ""))
        sets = f"is {', '.join(fields)}" if fields else ""
        return f"{self.place}: {self.key} " + "; ".join(part for part in (sets, self.why) if part)


def translate(tree: Tree, keys: Mapping[str, LegacyKey], translated: list[Translated], problems: list[Problem]) -> None:
    """Put the fields in the place of a file's legacy keys.

    Parameters
    ----------
    tree
        One file; changed in place.
    translated
        Gets the keys that were there.
    problems
        Gets values that cannot be read, and keys that are there in both spellings with different values.
    """
    for key in [key for key in tree.data if key in keys]:
        legacy, place, value = keys[key], tree.place((key,)), tree.data.pop(key)
        for below in [path for path in tree.places if path[0] == key]:
            del tree.places[below]
        try:
            values = legacy.read(value)
        except Unreadable as expected:
            problems.append(Problem(key, f"{value!r}", str(expected), where=place))
            continue
        sets = dict(zip(legacy.fields, values, strict=True))
        for field, new in sets.items():
            path = _path(field)
            if other := _conflict(tree.data, path, new):
                what = f"{other}, but {key} says {new!r} ({place})"
                problems.append(Problem(field, what, "one of the two", f"remove {key}", tree.place(path)))
            tree.set(path, new, place)
        translated.append(Translated(key, place, sets, legacy.why))


def _path(field: str) -> KeyPath:
    return tuple(field.split("."))


def _conflict(data: Any, path: KeyPath, new: Any) -> str:
    """What the file says of a field in our spelling, where it is something else: null as well, for all of a section."""
    for part in path:
        if not isinstance(data, Mapping):
            break
        if part not in data:
            return ""
        data = data[part]
    return "" if str(data) == str(new) else "null" if data is None else repr(data)


def _same(field: str) -> LegacyKey:
    return LegacyKey((field,), lambda value: (value,))


def _nothing(why: str) -> LegacyKey:
    return LegacyKey((), lambda value: (), f"sets nothing here: {why}")


def _one_of(field: str, values: Mapping[str, Any]) -> LegacyKey:
    return LegacyKey((field,), partial(_chosen, values))


def _chosen(values: Mapping[str, Any], value: Any) -> tuple[Any]:
    if not isinstance(value, str) or value not in values:
        raise Unreadable(" | ".join(values))
    return (values[value],)


def _gpus(value: Any) -> int:
    """How many GPUs `"0,1,2"`, `"4"`, `4` or `[0, 1]` names."""
    names = value if isinstance(value, list) else str(value).split(",")
    found = [str(name).strip() for name in names]
    if not found or isinstance(value, bool) or not all(name.isdigit() for name in found):
        raise Unreadable('numbers of GPUs, "0,1,2,3"')
    if len(set(found)) < len(found):
        raise Unreadable("each GPU once")
    return len(found)


WHICH_GPUS = "which GPUs is up to Slurm; on one machine, to CUDA_VISIBLE_DEVICES"

PROSETTING: Mapping[str, LegacyKey] = {
    "max_rounds": _same("run.rounds"),
    "save_rounds": _nothing("every trained round is kept"),
    "attempts_per_question": _same("sample.samples_per_prompt"),
    "physical_solver_gpu": LegacyKey(
        ("stages.collect.tasks", "stages.collect.gpus_per_node"), lambda value: (_gpus(value), 1), WHICH_GPUS
    ),
    "physical_grpo_gpu": LegacyKey(("stages.train.gpus_per_node",), lambda value: (_gpus(value),), WHICH_GPUS),
    "training_framework": _one_of("backend", {"TRL_DPO": "dpo", "VERL_PPO": "rloo"}),
    "trl_num_processes": _same("stages.train.ranks_per_node"),
    "trl_mixed_precision": _one_of("solver.dtype", {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}),
    "replay_frac": _same("pool.replay_fraction"),
    "auto_retry_enabled": _same("run.auto_retry"),
    "auto_continue_on_failure": _same("run.continue_on_failure"),
    "checkpoint_interval": _nothing(
        "each stage of each round can be resumed; how often a training saves within a round is dpo.save_steps and "
        "dpo.save_minutes"
    ),
    "solver_model_path": _same("solver.path"),
    "questions_file": _same("questions.file"),
    "workspace_dir": _same("run.workspace"),
    "teacher_base_url": _same("services.teacher.client.url"),
}
"""ProSetting's (S7, S8, S11, S13). Those that set nothing are also accepted as environment variables, in capitals."""
