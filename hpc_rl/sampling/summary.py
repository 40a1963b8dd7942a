"""What a round's sampling achieved, in numbers: pure functions from what is published and tasks' lives (V7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpc_rl.sampling.lives import PARTS, Life
from hpc_rl.sampling.published import Published
from hpc_rl.sampling.record import TaskRecord

MEMORY_SETTINGS = ("gpu_memory_utilization", "cpu_kv_cache_gib", "max_num_seqs")
"""What is lowered after running out of memory (`hpc_rl.engines.memory`)."""

Settings = Mapping[str, Mapping[str, int]]
"""By name, each value that tasks had, with how many had it."""


@dataclass(frozen=True)
class Worker:
    """One engine of a task that has several: seconds with a request, seconds ready for one, deaths, hung of these."""

    busy_s: float
    up_s: float
    deaths: int
    hung: int


@dataclass(frozen=True)
class Lowered:
    """Engines that take less memory than the config says, after running out of it so many times (`notches`)."""

    notches: int
    engines: int
    settings: Settings


@dataclass(frozen=True)
class Summary:
    """A stage's sampling.

    Attributes
    ----------
    published
        What there is.
    tasks, running
        Lives of tasks (a requeued one has several); those that have not ended.
    ends
        How the others ended, where somebody knows: by class (`hpc_rl.cluster.failures.Outcome`) their number.
    last
        By class the last of them: its error and log.
    seconds
        By part, over all tasks: they add up to `task_s`.
    at_work_s
        Of each task that drew a sample, all its lives together: seconds that it worked at samples.
    wall_s
        From the first task's beginning to the last one's end.
    gpu_s
        GPU seconds of all tasks; 0 where there are no GPUs.
    full_s, after_start_s
        Seconds with a full batch, of those after start-up.
    tokens, prompt_tokens, lost_tokens
        Drawn by all tasks, published or not.
    loading
        Seconds by part of start-up, of the tasks that opened an engine: those that the engine counts, and what is
        `other`: starting the process, libraries, reading and checking prompts.
    loaded
        How many tasks these are.
    engines
        What generated: by its name, settings as those tasks had them.
    lowered
        Engines with less memory than the config says.
    workers
        The engines of tasks that had several.
    """

    published: Published
    tasks: int
    running: int
    ends: Mapping[str, int]
    last: Mapping[str, Life]
    seconds: Mapping[str, float]
    at_work_s: tuple[float, ...]
    wall_s: float
    gpu_s: float
    full_s: float
    after_start_s: float
    tokens: int
    prompt_tokens: int
    lost_tokens: int
    loading: Mapping[str, float]
    loaded: int
    engines: Mapping[str, Settings]
    lowered: tuple[Lowered, ...]
    workers: tuple[Worker, ...]

    @property
    def task_s(self) -> float:
        """How long all tasks lived together."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens that one task draws in a second of sampling; 0 when none did."""
        return _ratio(self.tokens, self.seconds["sampling"] + self.seconds["lost"])

    @property
    def tokens_per_s_with_start_up(self) -> float:
        """Tokens that one task draws in a second of sampling or start-up."""
        sums = self.seconds
        return _ratio(self.tokens, sums["sampling"] + sums["lost"] + sums["start_up"])

    @property
    def tokens_per_s_of_all(self) -> float:
        """Published tokens of all tasks in a second of the stage's wall time."""
        return _ratio(self.published.tokens, self.wall_s)

    @property
    def seconds_per_accepted(self) -> float:
        """Seconds of tasks, lost ones included, for each sample that counts."""
        return _ratio(self.task_s, self.published.accepted)

    @property
    def gpu_s_per_accepted(self) -> float:
        """GPU seconds, lost ones included, for each sample that counts."""
        return _ratio(self.gpu_s, self.published.accepted)

    @property
    def fullness(self) -> float:
        """How full the engines' batches were after start-up, 1 = always full."""
        return _ratio(self.full_s, self.after_start_s)

    @property
    def imbalance(self) -> float:
        """How long the busiest task worked, as a multiple of the mean: 1 where all did as much."""
        return _ratio(max(self.at_work_s, default=0.0) * len(self.at_work_s), sum(self.at_work_s))

    def share(self, part: str) -> float:
        """Share of the tasks' time that went into a part."""
        return _ratio(self.seconds[part], self.task_s)

    def to_scalars(self) -> dict[str, float]:
        """Numbers for curves over rounds."""
        tally, by_role = self.published.tally, {}
        for role in sorted(tally.tries):
            by_role[f"acceptance/{role}"] = _ratio(tally.accepted.get(role, 0), tally.attempts(role))
            by_role[f"exhausted/{role}"] = float(tally.exhausted.get(role, 0))
        return {
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_with_start_up": self.tokens_per_s_with_start_up,
            "samples": float(self.published.samples),
            "accepted": float(self.published.accepted),
            "seconds_per_accepted": self.seconds_per_accepted,
            **({"gpu_seconds_per_accepted": self.gpu_s_per_accepted} if self.gpu_s else {}),
            "batch_fullness": self.fullness,
            **({"imbalance": self.imbalance} if self.at_work_s else {}),
            **by_role,
            **{f"share/{part}": self.share(part) for part in PARTS},
        }


def summarise(done: Published, tasks: Iterable[Life]) -> Summary:
    """Put both together."""
    tasks = list(tasks)
    records = [life.record for life in tasks if life.record is not None]
    loading = _loading(tasks)
    engines: dict[str, dict[str, Counter[str]]] = {}
    for record in records:
        settings = dict(record.engine)
        if workers := settings.pop("workers", None):
            settings["workers"] = len(workers)
        if settings:
            of_its_kind = engines.setdefault(str(settings.pop("engine", "?")), {})
            _count(of_its_kind, settings)
    return Summary(
        published=done,
        tasks=len(tasks),
        running=sum(not life.is_over for life in tasks),
        ends=Counter(life.outcome for life in tasks if life.outcome),
        last={life.outcome: life for life in sorted(tasks, key=lambda life: life.ended) if life.outcome},
        seconds={part: sum(life.seconds[part] for life in tasks) for part in PARTS},
        at_work_s=_at_work_s(tasks),
        wall_s=max((life.ended for life in tasks), default=0.0) - min((life.began for life in tasks), default=0.0),
        gpu_s=sum(life.gpu_s for life in tasks),
        full_s=sum(record.full_s for record in records),
        after_start_s=sum(sum(r.seconds.values()) - r.seconds["start_up"] for r in records),
        tokens=sum(life.tokens for life in tasks),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        lost_tokens=sum(life.lost_tokens for life in tasks),
        loading=loading,
        loaded=sum(bool(record.loading) for record in records),
        engines=engines,
        lowered=_lowered(records),
        workers=tuple(
            Worker(w.get("busy_s", 0.0), w.get("up_s", 0.0), w["deaths"], w.get("hung", 0))
            for record in records
            for w in record.engine.get("workers", ())
        ),
    )


def _loading(tasks: Iterable[Life]) -> dict[str, float]:
    found: dict[str, float] = {}
    for life in tasks:
        if life.record is not None and (own := life.record.loading):
            for part, seconds in {**own, "other": max(0.0, life.seconds["start_up"] - sum(own.values()))}.items():
                found[part] = found.get(part, 0.0) + seconds
    return found


def _at_work_s(tasks: Iterable[Life]) -> tuple[float, ...]:
    found: dict[tuple[str, str], float] = {}
    for life in tasks:
        if life.record is not None and life.record.tokens:
            task = life.record.attempt, life.record.job_id or life.record.name
            found[task] = found.get(task, 0.0) + life.at_work_s
    return tuple(found.values())


def _count(counters: dict[str, Counter[str]], settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        counters.setdefault(name, Counter())[f"{value:g}" if isinstance(value, float) else str(value)] += 1


def _lowered(records: Iterable[TaskRecord]) -> tuple[Lowered, ...]:
    """By notches; of a task with several engines each one counts, unless it was given up."""
    engines: Counter[int] = Counter()
    settings: dict[int, dict[str, Counter[str]]] = {}
    for record in records:
        for own in record.engine.get("workers", ({},)):
            engine = {**record.engine, **own}
            if (notches := engine.get("notches", 0)) and "given_up" not in own:
                engines[notches] += 1
                taken = {name: engine[name] for name in MEMORY_SETTINGS if name in engine}
                _count(settings.setdefault(notches, {}), taken)
    return tuple(Lowered(notches, engines[notches], settings[notches]) for notches in sorted(engines))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
