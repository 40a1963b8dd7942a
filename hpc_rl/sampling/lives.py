"""What became of the time of sampling tasks: each task's life, cut into what it was spent on. Pure functions.

Three kinds of witnesses, each for what it knows best. *End records* say how long a task really lived, from before its
first line until after its last, and how long it held GPUs; a task that was killed has one too, unless its node died.
*Records* say what a task did with its time. *Manifests* say what it published, and so what was lost.

No second is counted twice. A life is cut into what was spent on

    start_up    before its record began, and until its first request
    sampling    for what it published, or is still at work on
    judging, publishing, waiting
    lost        sampling for what was thrown away: the task was killed, told to leave, or overtaken
    closing     after its last words: the engine is closed, the process ends
    unknown     after the last record of a task that was killed

and the parts add up to the life. Of the sampling time, the share of tokens that were lost is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from hpc_rl.cluster.failures import Outcome
from hpc_rl.sampling.record import TaskRecord

PARTS = ("start_up", "sampling", "judging", "publishing", "waiting", "lost", "closing", "unknown")
"""What a task's time is spent on."""

AT_WORK = ("sampling", "judging", "publishing", "lost")

UNLIKE_CLOCKS_S = 1.0
"""A record may begin this much before its process, by clocks that are not quite the same."""


class End(Protocol):
    """What is asked of an end record (`hpc_rl.cluster.entry.EndRecord`)."""

    @property
    def name(self) -> str: ...
    @property
    def job_id(self) -> str: ...
    @property
    def restart(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def log(self) -> str: ...
    @property
    def started(self) -> float: ...
    @property
    def ended(self) -> float: ...
    @property
    def gpu_s(self) -> float: ...


@dataclass(frozen=True)
class Life:
    """One life of a task.

    Attributes
    ----------
    began, ended
        Seconds since the epoch; of one that still runs, when it was last heard of.
    is_over
        It has ended, one way or the other.
    seconds
        By part (`PARTS`); their sum is `ended − began`.
    gpu_s
        GPU seconds.
    tokens, lost_tokens
        Drawn, as far as known, and of these thrown away.
    record
        None for a task that ended while it started: it has one as soon as it can claim a shard.
    outcome
        How it ended (`hpc_rl.cluster.failures.Outcome`); '' where nobody knows: it still runs, or there is no end
        record of it.
    error, log
        The last error in its log, and where that is, relative to the workspace.
    """

    began: float
    ended: float
    is_over: bool
    seconds: Mapping[str, float]
    gpu_s: float
    tokens: int = 0
    lost_tokens: int = 0
    record: TaskRecord | None = None
    outcome: str = ""
    error: str = ""
    log: str = ""

    @property
    def at_work_s(self) -> float:
        """Seconds that it worked at samples, lost ones included."""
        return sum(self.seconds[part] for part in AT_WORK)


def lives(records: Iterable[TaskRecord], ends: Iterable[End], kept: Mapping[str, int], complete: bool) -> list[Life]:
    """The lives of a stage's tasks, in the order in which they began.

    Parameters
    ----------
    kept
        Tokens that each task published.
    complete
        Nothing is left to do in the stage: whatever else was drawn for it is lost.
    """
    of_process: dict[tuple[str, str, int], list[End]] = {}
    for end in ends:
        of_process.setdefault((end.name, end.job_id, end.restart), []).append(end)
    found = []
    for record in records:
        own = of_process.get((record.attempt, record.job_id, record.restart), [])
        matching = [end for end in own if end.started - UNLIKE_CLOCKS_S <= record.started <= end.ended]
        if matching:
            own.remove(matching[0])
        found.append(_life(record, matching[0] if matching else None, kept.get(record.name, 0), complete))
    found += [
        Life(
            end.started,
            end.ended,
            True,
            _parts(start_up=end.ended - end.started),
            end.gpu_s,
            outcome=end.outcome,
            error=end.error,
            log=end.log,
        )
        for own in of_process.values()
        for end in own
    ]
    return sorted(found, key=lambda life: life.began)


def _life(record: TaskRecord, end: End | None, kept: int, complete: bool) -> Life:
    is_over = end is not None or record.ended is not None or complete
    tokens = max(record.tokens, kept)
    lost = max(0, tokens - kept) if is_over else record.lost_tokens
    spent = dict(record.seconds)
    before_s = max(0.0, record.started - end.started) if end else 0.0
    known_s = before_s + sum(spent.values())
    began = record.started - before_s
    ended = max(end.ended if end else record.ended or record.updated, began + known_s)
    lost_s = spent["sampling"] * lost / tokens if tokens else 0.0
    rest = "closing" if record.ended is not None else "unknown"
    silent = Outcome.KILLED.value if is_over and record.ended is None else ""  # it could not say goodbye
    return Life(
        began=began,
        ended=ended,
        is_over=is_over,
        seconds=_parts(
            start_up=spent["start_up"] + before_s,
            sampling=spent["sampling"] - lost_s,
            judging=spent["judging"],
            publishing=spent["publishing"],
            waiting=spent["waiting"],
            lost=lost_s,
            **{rest: ended - began - known_s},
        ),
        gpu_s=end.gpu_s if end else record.gpus * (ended - began),
        tokens=tokens,
        lost_tokens=lost,
        record=record,
        outcome=end.outcome if end else silent,
        error=end.error if end else "",
        log=end.log if end else "",
    )


def _parts(**seconds: float) -> dict[str, float]:
    return {part: seconds.get(part, 0.0) for part in PARTS}
