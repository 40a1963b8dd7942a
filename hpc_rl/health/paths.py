"""Workspace, models, question files, images: what `launch` looks at before it submits anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl.config.checks import check
from hpc_rl.config.modeling import ModelConfig
from hpc_rl.config.walk import path_fields
from hpc_rl.health.findings import Finding, Subject, of_problem
from hpc_rl.units import size

AREA = "paths"
QUICKLY_READ_BYTES = 8 << 20
"""Input files that are larger together are not read with `--quick`."""


def paths(subject: Subject) -> Iterator[Finding]:
    """Every problem, and the models that are there."""
    config = subject.config
    files = list(dict.fromkeys(_input_files(subject)))
    too_large = subject.quick and sum(path.stat().st_size for path in files) > QUICKLY_READ_BYTES
    problems = check(config, subject.places, inside_files=not too_large)
    for problem in problems:
        yield of_problem(AREA, problem)
    wrong = {problem.field for problem in problems}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, ModelConfig) and f"{name}.path" not in wrong and name not in config.models_elsewhere():
            yield Finding(AREA, "ok", f"{name}.path: {section.path}, weights of {size(weights_bytes(section.path))}")
    for path in files:
        later = "; its rows are read without --quick" if too_large else ""
        if not any(str(path) in problem.what for problem in problems):
            yield Finding(AREA, "ok", f"{path}: {size(path.stat().st_size)}{later}")


def weights_bytes(folder: str | Path) -> int:
    """What a model's weights take on disk."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _input_files(subject: Subject) -> Iterator[Path]:
    """The files that the recipe's own sections name. (Interpreters, keys and the like are in the common ones.)"""
    config = subject.config
    own = set(type(config).model_fields) - set(configs.Config.model_fields)
    for key, text, mark in path_fields(type(config), configs.to_json(config)):
        if key[0] in own and not mark.command and Path(text).is_file():
            yield Path(text)
