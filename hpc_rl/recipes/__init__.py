"""Recipes: which stages a round has and what flows between them. No Slurm and no torch in here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Graph, Stage, StageId, build_graph

if TYPE_CHECKING:
    from hpc_rl.sampling.source import SampleTask
    from hpc_rl.training.task import TrainTask


class Recipe(Protocol):
    """What a recipe module offers; besides, `REPORT`: tables of its rounds (`hpc_rl.recipes.columns`), if any."""

    def stages(self, config: Config, round: int) -> Iterable[Stage]:
        """The stages of a round (0 is the preparation), each after what it needs."""

    def sampling(self, config: Config, stage: StageId) -> SampleTask:
        """What is sampled in a stage whose body is `jobs.sample`; for recipes that have one."""

    def training(self, config: Config, stage: StageId) -> TrainTask:
        """What is trained in a stage whose body is `jobs.train`; for recipes that have one."""


def load(name: str) -> Recipe:
    """The recipe `name`: a module of this package, or any module by its dotted path."""
    return cast(Recipe, importlib.import_module(name if "." in name else f"hpc_rl.recipes.{name}"))


def own_packages(name: str) -> list[Path]:
    """Folders of the packages that a recipe brings along: what the code snapshot needs beside ours."""
    package = name.partition(".")[0]
    if "." not in name or package == "hpc_rl":
        return []
    found = importlib.import_module(package).__file__
    return [Path(found).parent] if found else [Path(next(iter(importlib.import_module(package).__path__)))]


def resolve(config: Config) -> Config:
    """The config with what planning needs to know filled in by its recipe (its module's `resolve`, if it has one)."""
    fill_in = getattr(load(config.recipe), "resolve", None)
    return config if fill_in is None else cast(Config, fill_in(config))


def graph_of(config: Config) -> Graph:
    """The graph of the run that a config describes."""
    recipe = load(config.recipe)
    return build_graph(config.run.rounds, lambda round: recipe.stages(config, round))
