"""The ledger: every submission and every decision about a run, one JSON line each, only ever appended to.

Before sbatch an *intent* with a name unique to it, afterwards the job ids. A process that dies in between leaves an
intent without ids; the next reconcile looks the name up in the queue and either adopts the job or writes the intent
off. A last line that was cut off by a crash is skipped: it says nothing that the queue does not say too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hpc_rl.run.workspace import Workspace


@dataclass(frozen=True)
class Attempt:
    """One submission of a stage; `job_ids` is None until the scheduler's answer is on disk, `depends_on` are names."""

    name: str
    round: int
    stage: str
    number: int
    executor: str
    depends_on: tuple[str, ...] = ()
    job_ids: tuple[str, ...] | None = None
    written_off: bool = False
    cancelled: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class History:
    """The ledger, folded: all attempts in order, and whether the run is paused or stopped (and why).

    `given_up` says why a stage, by round and name, was left undone; it was so if the stage is done nevertheless.
    """

    attempts: tuple[Attempt, ...] = ()
    paused: str = ""
    stopped: str = ""
    resumed_at: float = 0.0
    skipped_lines: int = 0
    given_up: Mapping[tuple[int, str], str] = field(default_factory=dict)

    def of(self, round: int, stage: str) -> tuple[Attempt, ...]:
        """The attempts at one stage, oldest first."""
        return self._by_stage.get((round, stage), ())

    @cached_property
    def _by_stage(self) -> dict[tuple[int, str], tuple[Attempt, ...]]:
        found: dict[tuple[int, str], tuple[Attempt, ...]] = {}
        for attempt in self.attempts:
            key = (attempt.round, attempt.stage)
            found[key] = (*found.get(key, ()), attempt)
        return found


class Ledger:
    """Appends to and folds the ledger of a workspace. Only the holder of the run's lease appends."""

    def __init__(self, ws: Workspace) -> None:
        self.path = ws.ledger_path

    def append(self, event: str, **fields: Any) -> None:
        """Add one line and force it to disk before returning."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = "\n" + line  # a crash cut the last line off: ours must not be glued to it
            file.write(line.encode())
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any] | None]:
        """Each line's object, None for a line that cannot be read."""
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return
        for line in text.split("\n"):  # not splitlines: a text may hold U+2028 and the like
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                yield None
                continue
            yield entry if isinstance(entry, dict) else None

    def history(self) -> History:
        """Everything the ledger says, folded into attempts."""
        attempts: dict[str, Attempt] = {}
        paused = stopped = ""
        resumed_at = 0.0
        skipped = 0
        given_up: dict[tuple[int, str], str] = {}
        for entry in self.lines():
            if entry is None:
                skipped += 1
                continue
            event, name = entry.get("event"), entry.get("name", "")
            if event == "intent":
                attempts[name] = Attempt(
                    name,
                    entry["round"],
                    entry["stage"],
                    entry["number"],
                    entry["executor"],
                    tuple(entry["depends_on"]),
                    time=entry["time"],
                )
                given_up.pop((entry["round"], entry["stage"]), None)  # it is tried again
            elif event == "submitted" and name in attempts:
                known = attempts[name].job_ids or ()
                ids = (*known, *(i for i in entry["job_ids"] if i not in known))
                attempts[name] = replace(attempts[name], job_ids=ids, written_off=False)
            elif event == "written_off" and name in attempts:
                attempts[name] = replace(attempts[name], written_off=True)
            elif event == "cancelled" and name in attempts:
                attempts[name] = replace(attempts[name], cancelled=entry["why"])
            elif event == "given_up":
                given_up[entry["round"], entry["stage"]] = entry["why"]
            elif event == "paused":
                paused = entry["why"]
            elif event == "stopped":
                stopped = entry["why"]
            elif event == "resumed":
                paused = stopped = ""
                resumed_at = entry["time"]
        return History(tuple(attempts.values()), paused, stopped, resumed_at, skipped, given_up)
