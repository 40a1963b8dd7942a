"""The graph of a run: rounds of stages, as plain data that follows from the config alone.

A recipe declares the stages of a round; `Graph` strings the rounds together and adds what every run has: an `advance`
stage per round, which reconciles inside the cluster, and one after the last round, which is the spare: should an
advance job be killed, the next one in the chain does its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

ADVANCE = "advance"


class Kind(Enum):
    """How a stage runs: an array whose tasks claim shards, one job, ranks over nodes, or a service for others."""

    ARRAY = "array"
    SINGLE = "single"
    MULTINODE = "multi-node"
    SERVICE = "service"
    CONTROL = "control"


@dataclass(frozen=True, order=True)
class StageId:
    """A stage of a round."""

    round: int
    name: str

    def __str__(self) -> str:
        return f"round {self.round} {self.name}"


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    Attributes
    ----------
    id, job, kind
        Which stage, the module of its job body (`jobs.sample`), and how it runs.
    needs
        Stages whose work must be done before this one's body starts: the edges. The gate checks their manifests.
    shards
        Into how many pieces its work is cut; it is done when each has a manifest. Services and control stages have
        none.
    uses
        Service stages that must have started before this stage's job starts.
    serves
        Service stages only: whom it serves. It is needed until all of these are done.
    beside
        Service stages that run in this stage's job, as further components of one heterogeneous job: they are
        submitted with it, start with it and end with it.
    notches
        How often it takes less memory after running out of it (`hpc_rl.engines.memory`), before that stops the run.
        None: it takes as much each time, and that is an attempt like others.
    way_out
        What a person may do when it runs out of memory and takes no less any more: a sentence for the message.
    optional
        The run can go on without it: with `run.continue_on_failure` it is given up when it failed for good, and with it
        the optional stages of its round that need it. Whatever else needs it must know what its absence means.
    """

    id: StageId
    job: str
    kind: Kind
    needs: tuple[StageId, ...] = ()
    shards: int = 1
    uses: tuple[StageId, ...] = ()
    serves: tuple[StageId, ...] = ()
    beside: tuple[StageId, ...] = ()
    notches: int | None = None
    way_out: str = ""
    optional: bool = False

    @property
    def round(self) -> int:
        """The round it belongs to."""
        return self.id.round

    @property
    def name(self) -> str:
        """Its name within the round; also its key under `stages:` in the config."""
        return self.id.name

    @property
    def has_work(self) -> bool:
        """True for stages that are done by manifests (not services, not control)."""
        return self.kind not in (Kind.SERVICE, Kind.CONTROL)


@dataclass(frozen=True)
class Graph:
    """All stages of a run, rounds 0 to `rounds`, in an order in which each follows what it needs."""

    stages: tuple[Stage, ...]
    rounds: int
    by_id: dict[StageId, Stage] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {stage.id: stage for stage in self.stages})
        seen: set[StageId] = set()
        for stage in self.stages:
            missing = [str(i) for i in (*stage.needs, *stage.uses, *stage.beside) if i not in seen]
            if missing:
                raise ValueError(
                    f"{stage.id} follows {', '.join(missing)}, which the recipe does not declare before it"
                )
            if stage.id in seen:
                raise ValueError(f"the recipe declares {stage.id} twice")
            seen.add(stage.id)

    def __getitem__(self, id: StageId) -> Stage:
        return self.by_id[id]

    def of_round(self, round: int) -> tuple[Stage, ...]:
        """The stages of one round, in order."""
        return tuple(stage for stage in self.stages if stage.round == round)

    @cached_property
    def companions(self) -> frozenset[StageId]:
        """The stages that have no job of their own: they run beside another one."""
        return frozenset(id for stage in self.stages for id in stage.beside)

    @cached_property
    def work(self) -> tuple[Stage, ...]:
        """The stages that the run is about: those with manifests."""
        return tuple(stage for stage in self.stages if stage.has_work)


def build_graph(rounds: int, stages_of_round: Callable[[int], Iterable[Stage]]) -> Graph:
    """The graph of a run of rounds 0 (preparation) to `rounds`.

    The advance of a round follows the round's work and the advance before it; the last one, of round `rounds` + 1,
    follows only the advance before it.
    """
    stages: list[Stage] = []
    for number in range(rounds + 2):
        own = list(stages_of_round(number)) if number <= rounds else []
        before = (StageId(number - 1, ADVANCE),) if number else ()
        after = (*(stage.id for stage in own if stage.has_work), *before)
        stages += [*own, Stage(StageId(number, ADVANCE), "jobs.advance", Kind.CONTROL, needs=after, shards=0)]
    return Graph(tuple(stages), rounds)
