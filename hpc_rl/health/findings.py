"""What a check is given, and what it finds: a line each, with its remedy where something is to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Graph

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `problem`: the run would stop at it, or does. `warning`: it may, or be slow."""

    area: str
    level: Level
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.level == "ok", self.what


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes
    ----------
    places
        Who set which field (`Loaded.places`).
    executor
        slurm, local or debug.
    quick
        Answer in a second or two: wait for nobody, start no process for a stage.
    """

    config: Config
    graph: Graph
    executor: str
    quick: bool = False
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def patience_s(self) -> float:
        """How long an answer from elsewhere is waited for."""
        return 0.8 if self.quick else 15.0

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages that the run has, each once, in the order in which they first run."""
        return tuple(dict.fromkeys(stage.name for stage in self.graph.stages))


def of_problem(area: str, problem: Problem) -> Finding:
    """A problem of the config as a finding."""
    what = ": ".join(part for part in (problem.where, problem.field, problem.what) if part)
    expected = f"expected: {problem.expected}" if problem.expected else ""
    return Finding(area, "problem", what, "; ".join(p for p in (expected, problem.way_out) if p) or "correct the field")
