"""A run's report as data: what `gather` finds, and what both of its forms, JSON and text, are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpc_rl.recipes.columns import Number, Table
from hpc_rl.sampling.summary import Summary


@dataclass(frozen=True)
class Times:
    """When it happened. Seconds; dates since the epoch; None where nothing has happened yet.

    `stood_still_s` of `wall_s` the run was paused or stopped. `waited_s`: how long jobs waited for their start after
    nothing of the run stood in their way any more, summed over submissions that have started.
    """

    began: float | None
    ended: float | None
    wall_s: float
    stood_still_s: float
    waited_s: float


@dataclass(frozen=True)
class Cost:
    """What a stage used over all rounds and attempts, lost ones included.

    `wall_s` is summed over processes. `peak_memory_bytes` is that of the largest process, None where nobody looked.
    """

    stage: str
    processes: int
    wall_s: float
    cpu_s: float
    gpu_s: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Trouble:
    """A stage of a round that did not go well at once: how its processes ended, other than well, and the last words."""

    round: int
    stage: str
    attempts: int
    ends: Mapping[str, int]
    last_error: str
    log: str


@dataclass(frozen=True)
class WentWithout:
    """A stage that the run went on without: it was `given up` for good, or had `nothing to learn`."""

    round: int
    stage: str
    how: str
    reason: str


@dataclass(frozen=True)
class Training:
    """A training's numbers (S18), those of its manifest; None where it does not say."""

    round: int
    stage: str
    steps: Number | None
    first_loss: Number | None
    last_loss: Number | None
    mean_loss: Number | None
    mean_grad_norm: Number | None
    tokens_per_s: Number | None
    peak_gpu_gib: Number | None
    peak_host_gib: Number | None
    memory_notches: int
    per_device_batch_size: Number | None
    gradient_accumulation_steps: Number | None


@dataclass(frozen=True)
class Trend:
    """How a number went, from the first round that has it to the last one."""

    title: str
    first_round: int
    first: Number
    last_round: int
    last: Number


@dataclass(frozen=True)
class Rows:
    """A recipe's table filled in: `rows` by round, in each the numbers by the titles of `shown`."""

    table: Table
    about: str
    shown: tuple[str, ...]
    rows: Mapping[int, Mapping[str, Number]]
    trends: tuple[Trend, ...]


@dataclass(frozen=True)
class Sampled:
    """A round's sampling."""

    round: int
    stage: str
    summary: Summary


@dataclass(frozen=True)
class Folder:
    """How much lies in a folder of the workspace; `.` are the files in no folder."""

    name: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """All that is known of a run.

    `status` and `reason` are `hpc_rl.orchestrate.overview`'s; `unknown` where a damaged file does not let us tell.
    `rounds_done` counts finished rounds after round 0 of `rounds_planned`. `damaged` names what could not be read, and
    is not in the numbers; `notes` what else is to be known, such as a scheduler that did not answer.
    """

    name: str
    workspace: str
    recipe: str
    status: str
    reason: str
    rounds_done: int
    rounds_planned: int
    times: Times
    tables: tuple[Rows, ...]
    trainings: tuple[Training, ...]
    went_without: tuple[WentWithout, ...]
    troubles: tuple[Trouble, ...]
    costs: tuple[Cost, ...]
    storage: tuple[Folder, ...]
    free_bytes: int | None
    sampling: tuple[Sampled, ...]
    damaged: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        """Of all stages together."""
        return sum(cost.gpu_s for cost in self.costs) / 3600
