"""How many tries the tasks of a shard took, by role: numbers that add up over shards and array tasks (V4, V7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpc_rl.sampling.tasks import TaskQueue

K = TypeVar("K")


@dataclass(frozen=True)
class Tally:
    """Counts of finished tasks. They add up with `+`; `Tally()` is nothing.

    Attributes
    ----------
    tries
        By role: how many tasks took how many attempts.
    accepted
        By role: attempts that count.
    exhausted
        By role: tasks that ended without what they should have.
    """

    tries: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)
    exhausted: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, queue: TaskQueue) -> Tally:
        """Of the tasks of a queue that is done."""
        tries: dict[str, Counter[int]] = {task.role: Counter() for task in queue.tasks}
        accepted, exhausted = Counter(dict.fromkeys(tries, 0)), Counter(dict.fromkeys(tries, 0))
        for task in queue.tasks:
            tries[task.role][len(queue.history(task))] += 1
            accepted[task.role] += len(queue.kept(task))
        exhausted.update(task.role for task in queue.exhausted())
        return cls(tries, accepted, exhausted)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Tally:
        """Read what `to_plain` made, also after JSON."""
        tries = {role: {int(number): count for number, count in of.items()} for role, of in plain["tries"].items()}
        return cls(tries, dict(plain["accepted"]), dict(plain["exhausted"]))

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it: numbers of tries are strings there."""
        return {
            "tries": {role: {str(number): of[number] for number in sorted(of)} for role, of in self.tries.items()},
            "accepted": dict(self.accepted),
            "exhausted": dict(self.exhausted),
        }

    def tasks(self, role: str) -> int:
        """How many tasks of a role there were."""
        return sum(self.tries.get(role, {}).values())

    def attempts(self, role: str) -> int:
        """How many attempts they took together."""
        return sum(number * tasks for number, tasks in self.tries.get(role, {}).items())

    def __add__(self, other: Tally) -> Tally:
        roles = {**self.tries, **other.tries}
        return Tally(
            {role: _sum(self.tries.get(role, {}), other.tries.get(role, {})) for role in roles},
            _sum(self.accepted, other.accepted),
            _sum(self.exhausted, other.exhausted),
        )


def _sum(one: Mapping[K, int], other: Mapping[K, int]) -> dict[K, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
