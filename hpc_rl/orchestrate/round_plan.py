"""`python -m hpc_rl.orchestrate.round_plan WORKSPACE ROUND`: what slurm_templates/round.sh submits, a line per stage.

    NAME KIND TEMPLATE NEEDS STARTED NEXT

NEEDS are stages of the round that must have ended, STARTED services that must have started (commas between, `-` for
none); NEXT is `next` where the following round needs the stage, else `-`. TEMPLATE is that of the stage's kind;
round.sh prefers one of the stage's own name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.orchestrate.graph import Graph, Kind, Stage, StageId
from hpc_rl.run import atomic
from hpc_rl.run.workspace import Workspace

WITH_ENGINE = frozenset({"jobs.sample", "jobs.reference"})
"""Bodies of arrays that load a model."""


@dataclass(frozen=True)
class Planned:
    """One job of a round.

    Attributes
    ----------
    kind
        As in the graph; "sample" where the body is the one that samples.
    needs, started
        Stages of this round: those that must have ended, and services that must have started.
    next
        Whether the following round needs it.
    """

    name: str
    kind: str
    template: str
    needs: tuple[str, ...]
    started: tuple[str, ...]
    next: bool

    def __str__(self) -> str:
        lists = (",".join(names) or "-" for names in (self.needs, self.started))
        return " ".join((self.name, self.kind, self.template, *lists, "next" if self.next else "-"))


def plan(graph: Graph, round: int) -> Iterator[Planned]:
    """The jobs of a round, each after those that it needs. Services are jobs of their own, whatever their placement."""
    needed_next = {need for stage in graph.work if stage.round == round + 1 for need in stage.needs}
    for stage in graph.of_round(round):
        if stage.kind is Kind.CONTROL:
            continue
        kind = "sample" if stage.job == "jobs.sample" else stage.kind.value
        needs, started = (_here(ids, round) for ids in (stage.needs, (*stage.uses, *stage.beside)))
        yield Planned(stage.name, kind, _template(stage), needs, started, stage.id in needed_next)


def _here(ids: Sequence[StageId], round: int) -> tuple[str, ...]:
    return tuple(id.name for id in ids if id.round == round)


def _template(stage: Stage) -> str:
    """The script for stages of its kind: with GPUs for engines, ranks for trainings, else a few CPUs."""
    if stage.job in WITH_ENGINE:
        return "sample"
    return {Kind.SERVICE: "serve", Kind.MULTINODE: "train"}.get(stage.kind, "grade")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan."""
    parser = argparse.ArgumentParser(prog="python -m hpc_rl.orchestrate.round_plan", description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("round", type=int)
    arguments = parser.parse_args(argv)
    ws = Workspace(arguments.workspace)
    config = configs.from_json(atomic.read_json(ws.config_path), str(ws.config_path))
    graph = recipes.graph_of(config)
    planned = [*plan(graph, arguments.round)]
    if not planned:
        sys.exit(
            f"{ws.root} has rounds 0 to {graph.rounds}, and not {arguments.round}. For more of them raise run.rounds:\n"
            f"  python -m hpc_rl.launch CONFIG --workspace {ws.root} --init --set run.rounds={arguments.round}"
        )
    print(*planned, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
