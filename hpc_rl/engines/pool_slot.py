"""A place for a worker in a pool, over all the processes that fill it: what they did, and when the next one starts."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpc_rl.cluster.failures import is_out_of_memory
from hpc_rl.engines.base import Completion
from hpc_rl.engines.pool_process import Ended, WorkerProcess, state_of

log = logging.getLogger(__name__)

_PORT_TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


@dataclass(frozen=True)
class WorkerReport:
    """What the workers at one place have done so far.

    Attributes
    ----------
    gpus
        As CUDA_VISIBLE_DEVICES names them.
    ready_s
        Seconds from the start of the process until the engine was ready, the last time; 0 = never.
    up_s, busy_s
        Seconds with a ready engine, and those with requests in it.
    completions, tokens, prompt_tokens
        What it has sampled.
    deaths, hung, returned
        Processes that died; those of them that were killed because they hung; requests that went back into the queue.
    notches
        How often less memory was taken, earlier attempts of the task included.
    given_up
        No further process is started here.
    """

    worker: int
    gpus: tuple[str, ...]
    ready_s: float
    up_s: float
    busy_s: float
    completions: int
    tokens: int
    prompt_tokens: int
    deaths: int
    hung: int
    returned: int
    notches: int
    given_up: bool
    last_error: str


@dataclass(eq=False)
class Slot:
    """One place; `number` counts from 0, names from 1. `pauses_s`, `most_notches`: see `EnginePool`.

    `hung_at`: when (time.monotonic) its process was found to hang; None = it was not.
    """

    number: int
    of: int
    gpus: tuple[str, ...]
    notches: int
    most_notches: int
    pauses_s: Sequence[float]
    process: WorkerProcess | None = None
    is_ready: bool = False
    start_at: float = 0.0
    given_up: bool = False
    users_fault: bool = False
    capacity: int = 0
    ahead: int = 0
    description: Mapping[str, object] = field(default_factory=dict)
    loading: Mapping[str, float] = field(default_factory=dict)
    last_error: str = ""
    ready_s: float = 0.0
    completions: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    deaths: int = 0
    hung: int = 0
    hung_at: float | None = None
    returned: int = 0
    _pid: int = 0
    _silent_s: float = 0.0
    _in_a_row: int = 0
    _life_completions: int = 0
    _ready_at: float = 0.0
    _up_s: float = 0.0
    _busy_s: float = 0.0
    _life_busy_s: float = 0.0
    _said: str = ""
    _said_value_error: bool = False

    @property
    def name(self) -> str:
        """In messages."""
        gpus = f" on GPU {', '.join(self.gpus)}" if self.gpus else ""
        return f"worker {self.number + 1} of {self.of}{gpus}"

    def started(self, process: WorkerProcess) -> None:
        """A new process is on its way."""
        self.process, self.hung_at, self._silent_s = process, None, 0.0
        self._life_completions, self._life_busy_s, self._said, self._said_value_error = 0, 0.0, "", False

    def ready(
        self, pid: int, capacity: int, ahead: int, description: Mapping[str, object], loading: Mapping[str, float]
    ) -> None:
        """Its engine is open."""
        assert self.process is not None
        self._pid = pid
        self.is_ready, self.capacity, self.ahead = True, capacity, ahead
        self.description, self.loading = description, loading
        self._ready_at = time.monotonic()
        self.ready_s = self._ready_at - self.process.started
        log.info("%s is ready after %.0f s, %d samples at once", self.name, self.ready_s, capacity)

    def sampled(self, made: Sequence[Completion], busy_s: float) -> None:
        """It has done these requests, and has worked for so long since it is ready."""
        if self.is_ready:  # else its time is counted already: it was found to hang, and finished nevertheless
            self._life_busy_s = busy_s
        self._life_completions += len(made)
        self.completions += len(made)
        self.tokens += sum(len(completion.token_ids) for completion in made)
        self.prompt_tokens += sum(len(completion.prompt_token_ids) for completion in made)

    def heard(self) -> None:
        """It has said something, or need not say anything."""
        self._silent_s = 0.0

    def silent(self, passed_s: float) -> float:
        """It has said nothing for so much longer; for how long now, in seconds."""
        self._silent_s += passed_s
        return self._silent_s

    def hangs(self) -> None:
        """It has been silent for too long, and is about to be killed."""
        self.hung += 1
        self.hung_at = time.monotonic()
        self._said = f"has not moved for {self._silent_s:.0f} s, its process is {state_of(self._pid)}"
        log.error(
            "%s %s: it is killed. If a step of the engine may take that long, raise sample.worker_patience_s",
            self.name,
            self._said,
        )
        self.stopped()

    def failed(self, said: str, is_value_error: bool) -> None:
        """The process is about to end with this exception."""
        self._said, self._said_value_error = said, is_value_error

    def stopped(self) -> None:
        """It does nothing any more, and may not have ended yet."""
        if self.is_ready:
            self._up_s += time.monotonic() - self._ready_at
            self._busy_s += self._life_busy_s
            self._life_busy_s = 0.0
        self.is_ready = False

    def died(self, ended: Ended, returned: int, *, never_worked: bool, on_trial: bool) -> bool:
        """Nothing is left of the process: plan the next. Whether it ran out of memory, and the next takes less.

        Parameters
        ----------
        ended
            How it ended.
        returned
            Requests that it had.
        never_worked
            No worker of the pool has been ready yet.
        on_trial
            It had been given requests that were suspected to kill it.
        """
        assert self.process is not None
        lived_s, was_ready = time.monotonic() - self.process.started, self._ready_at > self.process.started
        self.process = None
        self.deaths += 1
        self.returned += returned
        self.last_error = self._said or ended.why()
        what = f"{self.name} died after {lived_s:.0f} s{'' if was_ready else ', before it was ready'}"
        what += f" ({self.last_error})" + (f"; its {returned} requests wait for another" if returned else "")
        lower = is_out_of_memory(f"{ended.tail}\n{self._said}") and self.notches < self.most_notches
        pause_s = 0.0
        if lower:
            self.notches += 1
            what += f". It ran out of memory, so the next one takes less (notch {self.notches} of {self.most_notches})"
        elif never_worked and self._said_value_error:
            self.given_up = self.users_fault = True
        elif not on_trial:
            self._in_a_row = 1 if was_ready and self._life_completions >= self.capacity else self._in_a_row + 1
            self.given_up = self._in_a_row > len(self.pauses_s)
            port_taken = _PORT_TAKEN.search(self.last_error + ended.tail)  # the next one has others
            if not self.given_up and not port_taken:
                pause_s = self.pauses_s[self._in_a_row - 1]
        if self.given_up:
            log.error("%s. It is given up", what)
        else:
            log.warning("%s. Another starts %s", what, f"in {pause_s:g} s" if pause_s else "now")
        self.start_at = time.monotonic() + pause_s
        return lower

    def difference(self, common: Mapping[str, object]) -> dict[str, object]:
        """What is its own, and in what its engine differs from `common`."""
        own = {name: value for name, value in self.description.items() if common.get(name) != value}
        made: dict[str, object] = {
            "gpus": list(self.gpus),
            "notches": self.notches,
            "deaths": self.deaths,
            "hung": self.hung,
            **own,
        }
        report = self.report()
        if report.completions:
            made |= {"up_s": report.up_s, "busy_s": report.busy_s, "tokens": report.tokens}
        if report.given_up:
            made["given_up"] = report.last_error
        return made

    def report(self) -> WorkerReport:
        """See `WorkerReport`."""
        up_s = self._up_s + (time.monotonic() - self._ready_at if self.is_ready else 0.0)
        busy_s = self._busy_s + self._life_busy_s
        return WorkerReport(
            self.number + 1, self.gpus, round(self.ready_s, 2), round(up_s, 2), round(busy_s, 2), self.completions,
            self.tokens, self.prompt_tokens, self.deaths, self.hung, self.returned, self.notches, self.given_up,
            self.last_error,
        )  # fmt: skip
