"""Several engines that work as one: worker processes of a node, each with GPUs of its own, fed from one queue.

Workers live as long as the pool. One that dies or hangs is replaced, and its requests go to the others meanwhile.
Nothing of them outlives the pool (`hpc_rl.engines.pool_guard`).
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from hpc_rl.config.gpu_shares import share_gpus
from hpc_rl.engines.base import Completion, Engine, EngineFailed, Prompt, Request, Sampling
from hpc_rl.engines.gpus import task_gpus
from hpc_rl.engines.pool_places import Finished, Lost, Places, Refused
from hpc_rl.engines.pool_queue import RequestQueue
from hpc_rl.engines.pool_slot import WorkerReport

STEP_S = 0.5
"""Longest wait of a step, so that whoever calls it sees to other things too."""
PAUSES_S = (1.0, 10.0, 60.0)
PATIENCE_S = 600.0
CLOSE_S = 5.0
"""For an engine to end by itself; then it is killed."""


class RequestRefused(ValueError):
    """A worker's engine cannot do a request (`key`); it was not sampled. The pool can be used further."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}")
        self.key = key


class PoisonedRequest(EngineFailed):
    """A request (`key`) whose workers die. The pool can be used further."""

    def __init__(self, key: str, deaths: int, error: str) -> None:
        super().__init__(f"{key}: {deaths} workers died while they sampled it, the last one nothing else: {error}")
        self.key = key


class PoolFailed(EngineFailed):
    """No worker is left, and none will be; the message has the last error of each."""


class EnginePool:
    """An engine of several engines.

    Parameters
    ----------
    open_worker
        Opens an engine, in a worker. Its argument says how often this worker has run out of memory: the more, the less
        it should take. It is pickled: an instance or function of a module that the workers can import.
    count
        Workers.
    gpus
        GPUs of each, as CUDA_VISIBLE_DEVICES names them; None = those of this process, shared equally.
    notches
        Argument of each place's first `open_worker`: how often earlier attempts ran out of memory.
    most_notches
        With more of them nothing gets less.
    pauses_s
        Before the next start at a place after one death, two, … in a row; after one more it stays empty. A death after
        as many samples as the engine draws at once is the first in a row again; one on trial (`pool_queue`) is none.
    patience_s
        A worker that has requests and does not move for so long hangs: it is killed, and counts as dead.

    Raises
    ------
    ValueError
        What opening the engine raised in a worker, for a fault of the user's.
    PoolFailed
        When no worker gets ready.
    """

    kind = "pool"

    def __init__(
        self,
        open_worker: Callable[[int], Engine],
        count: int,
        *,
        gpus: Sequence[Sequence[str]] | None = None,
        notches: int = 0,
        most_notches: int = 4,
        pauses_s: Sequence[float] = PAUSES_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if gpus is None:
            gpus = share_gpus(task_gpus(), count)
        assert len(gpus) == count >= 1
        self._places = Places(_pickled(open_worker), gpus, notches, most_notches, pauses_s, patience_s)
        self._queue = RequestQueue(count)
        self._made: list[tuple[str, Completion]] = []
        self._errors: list[RequestRefused | PoisonedRequest] = []
        self._closed = False
        started = time.monotonic()
        try:
            while self._places.first is None:
                self._turn(STEP_S)
                self._check_alive()
        except BaseException:
            self.close()
            raise
        self._loading = {**self._places.first.loading}
        rest_s = time.monotonic() - started - sum(self._loading.values())
        self._loading["worker"] = max(0.0, rest_s)  # the process, and what it imports

    @property
    def capacity(self) -> int:
        """What all workers together sample at once; one that is not ready yet counts as much as another."""
        assert self._places.first is not None
        usual = self._places.first.capacity
        return sum(slot.capacity or usual for slot in self._places.slots if not slot.given_up)

    @property
    def unfinished(self) -> int:
        """See `Engine.unfinished`."""
        return len(self._queue) + len(self._made) + len(self._errors)

    @property
    def description(self) -> Mapping[str, object]:
        """What is really used: that of the first worker that was ready, and what is different with others."""
        common = {} if self._places.first is None else self._places.first.description
        return {**common, "workers": [slot.difference(common) for slot in self._places.slots]}

    @property
    def loading(self) -> Mapping[str, float]:
        """Seconds by part until the first worker was ready."""
        return self._loading

    @property
    def workers(self) -> tuple[WorkerReport, ...]:
        """What each worker has done so far, for the record."""
        return tuple(slot.report() for slot in self._places.slots)

    def wait_until_all_are_ready(self) -> None:
        """Wait until each worker is ready or given up. Nobody has to: requests can be submitted before."""
        while not all(slot.is_ready or slot.given_up for slot in self._places.slots):
            self._turn(STEP_S)
            self._check_alive()

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """See `Engine.expect`: all, since it is the workers that read them."""
        return len(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """Take one more request; see `Engine.submit`. What its engine refuses, `step` raises (`RequestRefused`)."""
        assert not self._closed
        if key in self._queue:
            raise ValueError(f"{key} is in flight already; each request needs a key of its own")
        self._queue.add(key, request, sampling)
        self._feed()

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`; waits a moment where nothing has finished yet.

        Raises
        ------
        RequestRefused, PoisonedRequest
            For a request that will never finish. The others go on at the next call.
        PoolFailed
            When all workers are lost.
        """
        self._turn(STEP_S if len(self._queue) and not self._made and not self._errors else 0.0)
        if not self._made:
            if self._errors:
                raise self._errors.pop(0)
            if len(self._queue):
                self._check_alive()
        made, self._made = self._made, []
        return made

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`."""
        dropped = set(keys)
        self._made = [(key, made) for key, made in self._made if key not in dropped]
        self._errors = [error for error in self._errors if error.key not in dropped]
        for worker, ids in self._queue.abort(dropped).items():
            process = self._places.slots[worker].process
            assert process is not None
            process.channel.send("abort", ids)

    def close(self, patience_s: float = CLOSE_S) -> None:
        """End all workers: at their next step, and those that are not there after `patience_s` by force."""
        self._closed = True
        self._made, self._errors = [], []
        self._queue = RequestQueue(len(self._places.slots))
        self._places.close(patience_s)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _turn(self, timeout_s: float) -> None:
        """Hand out what waits, and hear what workers have to say; waits for that until the time is up."""
        self._feed()
        for event in self._places.turn(timeout_s, self._queue.owing()):
            slot = event.slot
            if isinstance(event, Finished):
                for number, completion in event.made:
                    if (item := self._queue.finished(slot.number, number)) is not None:
                        self._made.append((item.key, completion))
            elif isinstance(event, Refused):
                if (item := self._queue.finished(slot.number, event.number)) is not None:
                    self._errors.append(RequestRefused(item.key, event.why))
            else:
                self._lost(event)
        self._feed()

    def _feed(self) -> None:
        """Send each ready worker a little more than it can do at once; the rest waits here."""
        gone = self._queue.gone_prompts()
        ready = [slot for slot in self._places.slots if slot.is_ready]
        for slot in ready:
            assert slot.process is not None
            slot.process.forget(gone)
            slot.process.channel.flush()
        rooms = {slot.number: (slot.capacity, slot.capacity + slot.ahead) for slot in ready}
        for worker, items in self._queue.take(rooms):
            process = self._places.slots[worker].process
            assert process is not None
            process.submit(items)

    def _lost(self, event: Lost) -> None:
        """Nothing is left of a worker: others get its requests, and its place another worker."""
        slot = event.slot
        lowered = slot.died(
            event.ended,
            self._queue.in_flight(slot.number),
            never_worked=self._places.first is None,
            on_trial=self._queue.is_trial(slot.number),
        )
        poison = self._queue.died(slot.number, suspicious=not lowered)
        if poison is not None:
            self._errors.append(PoisonedRequest(poison.key, poison.deaths + 1, slot.last_error))

    def _check_alive(self) -> None:
        if not all(slot.given_up for slot in self._places.slots):
            return
        if all(slot.users_fault for slot in self._places.slots):
            raise ValueError(self._places.slots[0].last_error)
        raise PoolFailed("all workers are lost: " + "; ".join(f"{s.name}: {s.last_error}" for s in self._places.slots))


def _pickled(open_worker: Callable[[int], Engine]) -> bytes:
    data = pickle.dumps(open_worker)
    if b"__main__" in data:  # workers have a program of their own
        raise ValueError(f"{open_worker!r} is defined in the program that was started: put it into a module")
    return data
