"""The places of a pool, and the processes that fill them: started when they are due, heard, watched and ended.

What counts as alive: a worker that has requests says again and again that its loop gets on. The loop's own thread says
it, after each step and each prompt, so a step that never returns is silent, and so is a process that is stopped. A
worker that starts its engine, or that has nothing to do, need not say anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hpc_rl.engines.base import Completion
from hpc_rl.engines.pool_channel import wait
from hpc_rl.engines.pool_process import Ended, WorkerProcess, free_ports, wait_for_end
from hpc_rl.engines.pool_slot import Slot

KILLED_S = 15.0
"""For a guard to see the end of a killed worker, longer than it takes (`hpc_rl.engines.pool_guard`)."""
LOOKS = 10
"""Looks without a word from a worker before it counts as hung: a pool that was itself suspended has not listened."""


@dataclass(frozen=True)
class Finished:
    """A worker has done requests: their ids, and what was sampled."""

    slot: Slot
    made: list[tuple[int, Completion]]


@dataclass(frozen=True)
class Refused:
    """A worker's engine cannot do a request (`number`)."""

    slot: Slot
    number: int
    why: str


@dataclass(frozen=True)
class Lost:
    """Nothing is left of a worker."""

    slot: Slot
    ended: Ended


Event = Finished | Refused | Lost


class Places:
    """All places of a pool.

    Parameters
    ----------
    opener
        What opens a worker's engine, pickled.
    gpus
        GPUs of each place, as CUDA_VISIBLE_DEVICES names them.
    notches, most_notches, pauses_s, patience_s
        See `hpc_rl.engines.pool.EnginePool`.

    Attributes
    ----------
    first
        That of the first worker that was ready.
    clock
        Seconds by which workers are silent.
    """

    def __init__(
        self,
        opener: bytes,
        gpus: Sequence[Sequence[str]],
        notches: int,
        most_notches: int,
        pauses_s: Sequence[float],
        patience_s: float,
    ) -> None:
        self._opener, self._patience_s = opener, patience_s
        count = len(gpus)
        self.slots = [Slot(n, count, tuple(own), notches, most_notches, pauses_s) for n, own in enumerate(gpus)]
        self.first: Slot | None = None
        self._threads = max(1, len(os.sched_getaffinity(0)) // count)
        port = os.environ.get("VLLM_PORT", "")
        self._port = int(port) if port.isdigit() else None
        self.clock: Callable[[], float] = time.monotonic
        self._looked_at = self.clock()

    def turn(self, timeout_s: float, owing: Collection[int]) -> list[Event]:
        """Start what is due, and hear what workers have to say; waits for that until the time is up.

        Parameters
        ----------
        timeout_s
            Longest wait.
        owing
            Numbers of the workers that have requests: these are watched. A `Lost` one counts as running until
            `Slot.died` is called.
        """
        now, timeout_s = time.monotonic(), min(timeout_s, self._patience_s / LOOKS)
        for slot in self.slots:
            if slot.process is None and not slot.given_up:
                if slot.start_at <= now:
                    self._start(slot)
                else:
                    timeout_s = min(timeout_s, slot.start_at - now)
        running = [(slot, slot.process) for slot in self.slots if slot.process is not None]
        sources = {source: slot for slot, process in running for source in process.sources()}
        unsent = [process.channel.fileno() for _, process in running if process.channel.unsent_bytes]
        ready = wait(sources, unsent, timeout_s)
        events = [event for slot in dict.fromkeys(sources[source] for source in ready) for event in self._hear(slot)]
        lost = {event.slot.number for event in events if isinstance(event, Lost)}
        return events + self._watch([slot for slot, _ in running if slot.number not in lost], owing)

    def close(self, patience_s: float) -> None:
        """End all workers: at their next step, and those that are not there after `patience_s` by force."""
        alive = []
        for slot in self.slots:
            if slot.process is not None:
                alive.append(slot.process)
                slot.process.channel.send("close") if slot.is_ready else slot.process.kill()
                slot.stopped()
            slot.process, slot.given_up = None, True
        alive = wait_for_end(alive, patience_s)
        for process in alive:
            process.kill()
        for process in wait_for_end(alive, KILLED_S):
            process.kill_with_guard()

    def _start(self, slot: Slot) -> None:
        taken = [other.process.first_port for other in self.slots if other.process is not None]
        process = WorkerProcess(
            slot.number,
            self._opener,
            slot.notches,
            gpus=slot.gpus,
            first_port=free_ports(taken, self._port, slot.number),
            threads=self._threads,
            patience_s=self._patience_s,
        )
        slot.started(process)

    def _hear(self, slot: Slot) -> list[Event]:
        process = slot.process
        assert process is not None
        events: list[Event] = []
        for kind, *content in process.channel.receive():
            slot.heard()
            if kind == "ready":
                slot.ready(*content)
                self.first = self.first or slot
            elif kind == "finished":
                made, busy_s = content
                slot.sampled([completion for _, completion in made], busy_s)
                events.append(Finished(slot, made))
            elif kind == "refused":
                events.append(Refused(slot, *content))
            elif kind == "failed":
                slot.failed(*content)
            else:
                assert kind == "alive"
        if process.channel.ended:
            slot.stopped()
        if (ended := process.ended()) is not None:
            slot.stopped()
            events.append(Lost(slot, ended))
        return events

    def _watch(self, running: Sequence[Slot], owing: Collection[int]) -> list[Event]:
        """Have workers killed that say nothing for too long; let go of those that cannot even be killed."""
        events: list[Event] = []
        now = self.clock()
        passed_s, self._looked_at = min(now - self._looked_at, self._patience_s / LOOKS), now
        for slot in running:
            assert slot.process is not None
            if slot.hung_at is not None:
                if time.monotonic() - slot.hung_at > KILLED_S:
                    events.append(Lost(slot, slot.process.kill_with_guard()))
            elif slot.number not in owing:
                slot.heard()
            elif slot.silent(passed_s) > self._patience_s:
                slot.hangs()
                slot.process.kill()
        return events
