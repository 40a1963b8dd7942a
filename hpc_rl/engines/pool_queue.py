"""Which request goes to which worker of a pool, and what becomes of it when the worker dies. No processes in here.

Requests that share a Prompt object are a group and go to one worker, whose caches then serve them all; a worker that
would have nothing to do takes from the others nevertheless. A request that was in flight at `DEATHS` deaths of workers
is suspected of having caused them: suspects are tried without the others, then half of them, and so on, until the one
that kills its worker alone is found.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hpc_rl.engines.base import Prompt, Request, Sampling

DEATHS = 2


@dataclass(eq=False)
class Item:
    """A request in the pool. `id` is never used twice, `key` is the caller's."""

    id: int
    key: str
    request: Request
    sampling: Sampling
    group: Group
    deaths: int = 0


@dataclass(eq=False)
class Group:
    """All requests of one Prompt object. `number` is never used twice."""

    number: int
    waiting: deque[Item] = field(default_factory=deque)
    home: int | None = None  # the worker that has, or had, the others


class RequestQueue:
    """Waiting requests, and those in flight by worker; workers have numbers from 0."""

    def __init__(self, workers: int) -> None:
        self._items: dict[str, Item] = {}
        self._last_id = 0
        self._groups: dict[int, tuple[Group, weakref.ref[Prompt]]] = {}  # by id() of the prompt, while that lives
        self._gone: deque[int] = deque()
        self._fresh: deque[Group] = deque()  # with waiting requests, at home nowhere
        self._kept: list[deque[Group]] = [deque() for _ in range(workers)]  # with waiting requests, by their home
        self._flight: list[dict[int, Item]] = [{} for _ in range(workers)]
        self._trials: deque[list[Item]] = deque()
        self._trying = [False] * workers

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def in_flight(self, worker: int) -> int:
        """Requests that this worker has."""
        return len(self._flight[worker])

    def owing(self) -> set[int]:
        """Workers that have requests."""
        return {worker for worker, flight in enumerate(self._flight) if flight}

    def is_trial(self, worker: int) -> bool:
        """Whether what this worker has is suspected to kill it."""
        return self._trying[worker] and bool(self._flight[worker])

    def add(self, key: str, request: Request, sampling: Sampling) -> None:
        """A new request; its key must be that of no other one here."""
        group = self._group_of(request.prompt)
        self._last_id += 1
        self._items[key] = item = Item(self._last_id, key, request, sampling, group)
        group.waiting.append(item)
        if len(group.waiting) == 1:
            (self._fresh if group.home is None else self._kept[group.home]).append(group)

    def _group_of(self, prompt: Prompt) -> Group:
        place = id(prompt)
        if place not in self._groups:
            number = self._last_id + 1
            groups, gone = self._groups, self._gone

            def forget(_: object) -> None:
                del groups[place]
                gone.append(number)

            self._groups[place] = Group(number), weakref.ref(prompt, forget)
        return self._groups[place][0]

    def gone_prompts(self) -> list[int]:
        """Numbers of groups whose prompt nobody holds any more, since the last call."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def take(self, rooms: Mapping[int, tuple[int, int]]) -> list[tuple[int, list[Item]]]:
        """Hand out what waits: (worker, requests) in the order in which they are to be sent.

        Parameters
        ----------
        rooms
            By worker: its capacity, and how many requests it may have at most.
        """
        taken: list[tuple[int, list[Item]]] = []
        for worker in rooms:
            if not self._flight[worker]:
                self._trying[worker] = False
                if self._trials:
                    self._trying[worker] = True
                    taken.append((worker, self._sent(worker, self._trials.popleft())))
        open_to_all = {worker: room for worker, room in rooms.items() if not self._trying[worker]}
        for worker, (_, limit) in open_to_all.items():
            while self._kept[worker] and self.in_flight(worker) < limit:
                taken.append((worker, self._from_first(worker, limit)))
        while self._fresh or any(self._kept):
            free = {w: self.in_flight(w) / capacity for w, (capacity, limit) in open_to_all.items()
                    if self.in_flight(w) < limit}  # fmt: skip
            if not free:
                break
            worker = min(free, key=free.__getitem__)
            # the last of another's groups is the one that it would come to last
            group = self._fresh.popleft() if self._fresh else max(self._kept, key=len).pop()
            group.home = worker
            self._kept[worker].append(group)
            taken.append((worker, self._from_first(worker, open_to_all[worker][1])))
        return taken

    def _from_first(self, worker: int, limit: int) -> list[Item]:
        group = self._kept[worker][0]
        room = limit - self.in_flight(worker)
        items = [group.waiting.popleft() for _ in range(min(room, len(group.waiting)))]
        if not group.waiting:
            self._kept[worker].popleft()
        return self._sent(worker, items)

    def _sent(self, worker: int, items: list[Item]) -> list[Item]:
        self._flight[worker] |= {item.id: item for item in items}
        return items

    def finished(self, worker: int, number: int) -> Item | None:
        """The request with this id, which the worker has done; None when it was aborted meanwhile."""
        item = self._flight[worker].pop(number, None)
        if item is not None:
            del self._items[item.key]
        return item

    def abort(self, keys: Iterable[str]) -> dict[int, list[int]]:
        """Forget requests; ids by worker of those that were in flight. Unknown keys are none of ours."""
        sent: dict[int, list[int]] = {}
        dropped = {item.id for key in keys if (item := self._items.pop(key, None)) is not None}
        for worker, flight in enumerate(self._flight):
            if ids := sorted(flight.keys() & dropped):
                sent[worker] = ids
                self._flight[worker] = {number: item for number, item in flight.items() if number not in dropped}
        for groups in (self._fresh, *self._kept):
            for group in groups:
                group.waiting = deque(item for item in group.waiting if item.id not in dropped)
            left = [group for group in groups if group.waiting]
            groups.clear()
            groups.extend(left)
        trials = [[item for item in trial if item.id not in dropped] for trial in self._trials]
        self._trials = deque(trial for trial in trials if trial)
        return sent

    def died(self, worker: int, *, suspicious: bool) -> Item | None:
        """A worker is gone: its requests wait again, before all others. Returns the one that has killed it, if known.

        Parameters
        ----------
        worker
            Which.
        suspicious
            Whether one of its requests may have been the cause.
        """
        items, trial = list(self._flight[worker].values()), self._trying[worker]
        self._flight[worker], self._trying[worker] = {}, False
        for group in self._kept[worker]:
            group.home = None
        self._fresh.extendleft(reversed(self._kept[worker]))
        self._kept[worker].clear()
        for group, _ in list(self._groups.values()):
            if group.home == worker:
                group.home = None
        if trial and suspicious:
            if len(items) == 1:
                del self._items[items[0].key]
                return items[0]
            half = (len(items) + 1) // 2
            self._trials.extendleft(part for part in (items[half:], items[:half]) if part)
            return None
        for item in items:
            item.deaths += suspicious
        if suspects := [item for item in items if item.deaths >= DEATHS]:
            self._trials.append(suspects)
        for item in reversed([item for item in items if item.deaths < DEATHS]):
            self._wait_first(item)
        return None

    def _wait_first(self, item: Item) -> None:
        group = item.group
        group.waiting.appendleft(item)
        if len(group.waiting) == 1:
            (self._fresh if group.home is None else self._kept[group.home]).appendleft(group)
