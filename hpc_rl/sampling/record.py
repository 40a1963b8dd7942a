"""What a sampling task did with its time: one small JSON file per task, kept up to date, so that a kill loses little.

A task is in one *phase* at any time, so its seconds add up to its life by construction:

    start_up    from its first line to its first request: weights, engine, prompts
    sampling    the engine has work, and the task does nothing but hand it over and take it back
    judging     it judges completions; the engine may go on meanwhile
    publishing  the engine waits until a shard is claimed, read or written
    waiting     the engine has nothing to do: all that is left is in other hands

Records are for reports only and decide nothing. What a task has *kept* is said by the manifests of its shards, which
name it (`metrics.task`): they are exact however it ended. The rest of what it drew is lost, or still under way.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from hpc_rl.run import atomic, manifest
from hpc_rl.run.workspace import SCHEMA

log = logging.getLogger(__name__)

Phase = Literal["start_up", "sampling", "judging", "publishing", "waiting"]
PHASES: tuple[Phase, ...] = get_args(Phase)

FOLDER = "tasks"
"""Where records lie in a stage's folder."""

EVERY_S = 30.0
"""Pause between two writes: what is unknown of a task that was killed."""


@dataclass(frozen=True)
class TaskRecord:
    """A task as it stood when the record was last written.

    Attributes
    ----------
    name
        Unique to the task's life: a requeued array element writes a new record.
    attempt, job_id, restart, host
        The submission, the array element, how often Slurm restarted it, and where.
    gpus
        GPUs that the task holds; 0 where there are none.
    started, updated, ended
        Seconds since the epoch; `ended` is None while it runs, and for ever if it was killed.
    seconds
        By phase. Their sum is `updated − started`.
    loading
        Seconds by part of opening the engine (staging, weights, …); parts of `start_up`.
    engine
        What really generates: kind and why, memory, sequences at once, replaced workers.
    full_s
        Seconds with a full batch: of the phases after `start_up`, each second by the share of the requests that the
        engine can sample at once which it had.
    samples, tokens, prompt_tokens
        Completions drawn, their tokens, and their prompts' tokens; kept, lost and under way.
    shards, kept_tokens
        Published by this task, and the tokens in them.
    lost_shards, lost_tokens
        Worked at in vain so far as the task knew: somebody else published them, or it had to leave before their end.
    """

    name: str
    attempt: str
    job_id: str
    restart: int
    host: str
    gpus: float
    started: float
    updated: float
    ended: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    loading: Mapping[str, float] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    full_s: float = 0.0
    samples: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    shards: int = 0
    kept_tokens: int = 0
    lost_shards: int = 0
    lost_tokens: int = 0
    schema: int = SCHEMA


class Recorder:
    """Keeps a task's record while it lives; a thread writes it every `every_s` seconds.

    As a context manager it is closed on exit, whatever the reason. To be used from one thread.

    Parameters
    ----------
    folder
        The stage's folder.
    name
        The task's name: its claim token.
    gpus
        How many it holds.

    Raises
    ------
    ValueError
        When another task has taken the name.
    """

    def __init__(self, folder: Path, name: str, gpus: float = 0.0, *, every_s: float = EVERY_S) -> None:
        self.name = name
        self.path = folder / FOLDER / f"{name}.json"
        self._gpus, self._every_s = gpus, every_s
        self._started = time.time()
        self._ended: float | None = None
        self._phase: Phase = "start_up"
        self._since = time.monotonic()
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._engine: Mapping[str, Any] = {}
        self._loading: Mapping[str, float] = {}
        self._fullness, self._full_s = 0.0, 0.0
        self._counts = dict.fromkeys(
            ("samples", "tokens", "prompt_tokens", "shards", "kept_tokens", "lost_shards", "lost_tokens"), 0
        )
        self._lock = threading.Lock()
        self._closing = threading.Event()
        if not atomic.create_exclusive(self.path, atomic.to_json(asdict(self.record()))):
            raise ValueError(f"{self.path} is another task's record: the name of a task must be its own")
        self._thread = threading.Thread(target=self._keep, name="task-record", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase) -> Phase:
        """Begin a phase, which ends the one before; returns that one."""
        assert phase in PHASES, phase
        with self._lock:
            before = self._phase
            self._pass()
            self._phase = phase
        return before

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """A phase within another one, which goes on after it."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def opened(self, engine: Mapping[str, Any], loading: Mapping[str, float]) -> None:
        """What generates, and what its start cost. Told again when it has changed (a replaced worker)."""
        plain, seconds = manifest.to_plain(dict(engine)), {name: round(s, 3) for name, s in loading.items()}
        with self._lock:
            self._engine, self._loading = plain, seconds

    def at_work_on(self, requests: int, capacity: int) -> None:
        """How many requests the engine has from now on, of how many that it samples at once."""
        with self._lock:
            self._pass()
            self._fullness = min(1.0, requests / max(1, capacity))

    def drew(self, tokens: int, prompt_tokens: int) -> None:
        """One completion has come."""
        self._add(samples=1, tokens=tokens, prompt_tokens=prompt_tokens)

    def published(self, tokens: int) -> None:
        """A shard is done by us; its manifest names this task."""
        self._add(shards=1, kept_tokens=tokens)

    def lost(self, tokens: int) -> None:
        """A shard is given up, with so many tokens drawn for it."""
        self._add(lost_shards=1, lost_tokens=tokens)

    def _add(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                self._counts[name] += count

    def _pass(self) -> None:
        """Account for the time until now. Under the lock."""
        now = time.monotonic()
        passed_s, self._since = now - self._since, now
        self._seconds[self._phase] += passed_s
        if self._phase != "start_up":
            self._full_s += passed_s * self._fullness

    def record(self) -> TaskRecord:
        """The record as of now."""
        with self._lock:
            self._pass()
            return TaskRecord(
                name=self.name,
                attempt=os.environ.get("HPC_RL_ATTEMPT", ""),
                job_id=os.environ.get("HPC_RL_JOB_ID", ""),
                restart=int(os.environ.get("HPC_RL_RESTART", "0")),
                host=socket.gethostname(),
                gpus=self._gpus,
                started=self._started,
                updated=self._started + sum(self._seconds.values()),
                ended=self._ended,
                seconds={phase: round(seconds, 3) for phase, seconds in self._seconds.items()},
                loading=self._loading,
                engine=self._engine,
                full_s=round(self._full_s, 3),
                **self._counts,
            )

    def _keep(self) -> None:
        while not self._closing.wait(self._every_s):
            self._write()

    def _write(self) -> None:
        try:
            atomic.write_json(self.path, asdict(self.record()), lasting=False)
        except OSError as error:  # the work goes on: records are for reports
            log.warning("this task's record cannot be written (%s); the report will know less of it", error)

    def close(self) -> None:
        """Write the record for the last time."""
        self._closing.set()
        self._thread.join()
        self._ended = time.time()
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(folder: Path) -> Iterator[TaskRecord]:
    """The records in a stage's folder, one after the other, in no particular order.

    Raises
    ------
    CorruptFile
        When a file is not a record, or was written by a newer version.
    """
    try:
        names = os.listdir(folder / FOLDER)
    except FileNotFoundError:
        return
    for name in names:
        if not name.startswith(".") and name.endswith(".json"):
            yield _read(folder / FOLDER / name)


def _read(path: Path) -> TaskRecord:
    data = atomic.read_json(path)
    try:
        if data["schema"] > SCHEMA:
            newer = f"{path} was written by a newer hpc_rl (schema {data['schema']}, this one reads {SCHEMA})"
            raise atomic.CorruptFile(newer)
        return TaskRecord(**data)
    except (TypeError, KeyError) as error:
        raise atomic.CorruptFile(f"{path} is not a task's record ({error})") from error
