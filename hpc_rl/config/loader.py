"""From a YAML file to a typed config: extends, environment, `.env`, `--set`; every problem named with file and line.

Who wins, from last to first: files that are extended, the file, `.env` in the current directory, the environment,
`--set`, `--workspace`. Relative paths in path fields start at the current directory, as on any command line (shipped
configs are therefore run from the repository's root); only `extends` is relative to its file.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.config.environment import NAMES, Environment, UnsetVariable, expand, read_environment
from hpc_rl.config.errors import ConfigError, Problem
from hpc_rl.config.legacy import Translated, translate
from hpc_rl.config.report import problems_of
from hpc_rl.config.schema import Config, nearest
from hpc_rl.config.source import KeyPath, Tree, parse_value, read_yaml
from hpc_rl.config.walk import field_at, path_fields, split_dotted

RECIPES: Mapping[str, str] = {
    "lewis": "hpc_rl.config.lewis:LewisConfig",
    "prosetting": "hpc_rl.config.prosetting:ProSettingConfig",
}
"""Shipped recipes and their config classes. Another recipe, given by its dotted path, names its own in `CONFIG`."""


@dataclass(frozen=True)
class Loaded:
    """A config and how it came about.

    Attributes
    ----------
    config
        The typed tree; a `LewisConfig` for recipe lewis.
    places
        Dotted field → who set it (`configs/lewis.yaml:12`, `environment variable LORA_RANK`, `--set`); a field that is
        not here has its default.
    notes
        What a user should hear although it is no error, such as an environment variable that changes nothing;
        `Config.notes` among it.
    translated
        What became of each key of the seed's own config file, and of its variables that set nothing here; a line for
        each (`hpc_rl.config.legacy`).
    """

    config: Config
    places: Mapping[str, str]
    notes: tuple[str, ...]
    translated: tuple[str, ...] = ()

    def overridden(self) -> dict[str, str]:
        """The fields that something else than a YAML file set, with who did."""
        marks = ("--", ".env", "environment")
        return {key: place for key, place in self.places.items() if place.startswith(marks)}


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
    workspace: str | Path | None = None,
    *,
    cwd: Path | None = None,
) -> Config:
    """The config of a run; `load_with_places` says in addition who set what.

    Parameters
    ----------
    path
        YAML file.
    overrides
        `key.path=value` as after `--set`; the value is YAML.
    env
        Environment variables; `NAMES` and the recipe's `Config.variables` list those that set fields.
    workspace
        Beats `run.workspace`.
    cwd
        Where `.env` is looked for and from which relative paths are taken. Default: the current directory.

    Raises
    ------
    ConfigError
        With every problem that was found.
    """
    return load_with_places(path, overrides, env, workspace, cwd=cwd).config


def load_with_places(
    path: str | Path,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
    workspace: str | Path | None = None,
    *,
    cwd: Path | None = None,
) -> Loaded:
    """As `load`, with the place of every field that was set."""
    cwd = (cwd or Path.cwd()).absolute()
    tree = read_yaml(cwd / path)
    problems: list[Problem] = []
    translated: list[Translated] = []
    settings = [setting for text in overrides if (setting := _setting(text, problems))]
    for dotted, value in settings:
        if dotted == "recipe":
            tree.set(("recipe",), value, "--set")
    cls = config_class(tree.data.get("recipe", "lewis"), tree.place(("recipe",)))
    if cls.legacy_keys:  # once more, now that the recipe is known
        tree = read_yaml(cwd / path, each=lambda own: translate(own, cls.legacy_keys, translated, problems))
    environment = read_environment(env, cwd)
    # Twice: --set decides which optional sections there are, and wins over the variables that set fields in them.
    _apply_settings(preview := deepcopy(tree), cls, settings)
    notes = _apply_environment(tree, preview, cls, environment)
    _apply_settings(tree, cls, settings)
    if workspace is not None:
        tree.set(("run", "workspace"), str(workspace), "--workspace")
    _default_workspace(tree)
    _expand_paths(tree, cls, environment, cwd, problems)
    try:
        config = cls.model_validate(tree.data)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error, cls, tree)]) from None
    if problems:
        raise ConfigError(problems)
    places = {".".join(map(str, key)): place for key, place in tree.places.items()}
    said = dict.fromkeys(key.said(tree) for key in translated)  # a file that is extended twice is read twice
    notes += _keys_in_vain(config, environment)
    return Loaded(config, places, (*notes, *config.notes()), (*said, *_without_fields(cls, environment)))


def config_class(recipe: Any, where: str = "") -> type[Config]:
    """The config class of a recipe, by its short name or by the dotted path of a module with `CONFIG`."""
    known = ", ".join(RECIPES)
    expected = f"{known}, or the dotted path of your own recipe's module"
    if not isinstance(recipe, str):
        raise ConfigError([Problem("recipe", repr(recipe), expected, where=where)])
    module_name, _, attribute = RECIPES.get(recipe, f"{recipe}:CONFIG").partition(":")
    if recipe not in RECIPES and "." not in recipe:
        raise ConfigError([Problem("recipe", f"{recipe!r} is unknown", expected, nearest(recipe, RECIPES), where)])
    try:
        found = getattr(importlib.import_module(module_name), attribute, Config)
    except ModuleNotFoundError as error:
        what = f"cannot import {module_name!r} ({error})"
        raise ConfigError([Problem("recipe", what, expected, "is it on PYTHONPATH?", where)]) from None
    if not (isinstance(found, type) and issubclass(found, Config)):
        raise ConfigError([Problem("recipe", f"{module_name}.{attribute} is no subclass of Config", where=where)])
    return found


def from_json(data: Mapping[str, Any], name: str = "training_config.json") -> Config:
    """The config that a job reads back: `to_json` undone. Paths are absolute already; nothing else is looked at.

    Raises
    ------
    ConfigError
        When the data is no config of this version; `name` is the file in the message.
    """
    if not isinstance(data, Mapping):
        raise ConfigError([Problem("", f"{name} holds no JSON object", "the config of a run")])
    cls = config_class(data.get("recipe", "lewis"), name)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        tree = Tree(dict(data), {(key,): name for key in data})
        raise ConfigError(problems_of(error, cls, tree)) from None


def _setting(text: str, problems: list[Problem]) -> tuple[str, Any] | None:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        way_out = "e.g. --set sample.shard_size=8"
        problems.append(Problem("", f"{text!r} is no setting", "key.path=value", way_out, "--set"))
        return None
    try:
        return key, parse_value(value)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        way_out = f"quote it: --set '{key}=\"…\"'"
        problems.append(Problem(key, f"the value {value!r} is no YAML: {reason}", way_out=way_out, where="--set"))
        return None


def _apply_settings(tree: Tree, cls: type[Config], settings: Sequence[tuple[str, Any]]) -> None:
    for dotted, value in settings:
        tree.set(split_dotted(cls, dotted, cls.stage_names), value, "--set")


def _apply_environment(tree: Tree, preview: Tree, cls: type[Config], environment: Environment) -> list[str]:
    notes = []
    for name, dotted in {**NAMES, **cls.variables}.items():
        found = environment.get(name)
        key = split_dotted(cls, dotted, cls.stage_names)
        if found is None or field_at(cls, key) is None:
            continue
        value, place = found
        if _is_off(preview.data, cls, key[:-1]):
            notes.append(f"{place} changes nothing: {'.'.join(map(str, key[:-1]))} is null in this config")
            continue
        tree.set(key, value, place)
    return notes


def _without_fields(cls: type[Config], environment: Environment) -> list[str]:
    """Variables of a seed that set nothing here, and why."""
    nothing = {name.upper(): legacy.why for name, legacy in cls.legacy_keys.items() if not legacy.fields}
    return [f"{found[1]} {why}" for name, why in nothing.items() if (found := environment.get(name))]


def _keys_in_vain(config: Config, environment: Environment) -> list[str]:
    """Keys of endpoints that are in `.env`, where no job looks: they are no part of a config."""
    services = config.services
    clients = {name: services.of(name).client for name in type(services).model_fields}
    teachers = {name: client for name, client in clients.items() if isinstance(client, TeacherClientConfig)}
    notes = {}
    for name, client in teachers.items():
        place = (environment.get(client.api_key_env) or ("", ""))[1]
        if client.url is not None and client.api_key_file is None and place.startswith(".env"):
            notes[place] = (
                f"{place} changes nothing: jobs read it from their environment. Export it, or write it into a file "
                f"of mode 0600 and name that in services.{name}.client.api_key_file"
            )
    return [*notes.values()]


def _is_off(data: Mapping[str, Any], cls: type[Config], section: KeyPath) -> bool:
    """Whether an optional section above a field is null: a variable must not switch it on."""
    value: Any = data
    for length, key in enumerate(section, 1):
        value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            info = field_at(cls, section[:length])
            return info is not None and info.default is None  # stages are no fields: they are there
    return False


def _default_workspace(tree: Tree) -> None:
    run = tree.data.get("run")
    if isinstance(run, dict) and run.get("workspace") is None:
        run["workspace"] = f"runs/{run.get('name', '')}"


def _expand_paths(tree: Tree, cls: type[Config], environment: Environment, cwd: Path, problems: list[Problem]) -> None:
    for key, text, mark in list(path_fields(cls, tree.data)):
        try:
            expanded = expand(text, environment)
        except UnsetVariable as error:
            what = f"{text!r}: the variable {error} is not set"
            way_out = f"set {error} in the environment or in .env, or write the path here"
            problems.append(Problem(".".join(map(str, key)), what, "", way_out, tree.place(key)))
            continue
        if expanded and not (mark.command and "/" not in expanded):
            expanded = os.path.normpath(cwd / expanded)
        _replace(tree.data, key, expanded)


def _replace(data: Any, key: KeyPath, value: Any) -> None:
    for part in key[:-1]:
        data = data[part]
    data[key[-1]] = value
