"""The tasks of a shard, their attempts, and which to draw next (V2, V3). Pure Python: no engine, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_rl.engines.base import Prompt
from hpc_rl.run.seeds import derive
from hpc_rl.sampling.rules import Outcome, Rule


@dataclass(frozen=True)
class Task:
    """What one role is asked about one row (V2).

    Attributes
    ----------
    id
        Unique in the run, and the beginning of its samples' ids: `r01-<row id>`.
    role
        Who is asked: `speaker`, `helpful`, `sneaky`.
    group
        Number of the row in the round.
    row_id
        The data set row.
    prompt
        What the role reads.
    """

    id: str
    role: str
    group: int
    row_id: str
    prompt: Prompt


@dataclass(frozen=True)
class Attempt:
    """One completion that is drawn for a task; `number` counts from 0."""

    task: Task
    number: int

    @property
    def id(self) -> str:
        """Unique in the run; that of its sample."""
        return f"{self.task.id}-g{self.number}"

    def seed(self, run_seed: int, round: int) -> int:
        """Its own seed: each attempt draws something new, and whoever repeats it draws the same (V3)."""
        return derive(run_seed, round, self.task.role, self.task.row_id, self.number)


class TaskQueue:
    """The tasks of one shard, from their first attempts to the last retry.

    Which attempts are drawn depends on their outcomes alone, not on the order in which they finish.

    Parameters
    ----------
    tasks
        One for each row and role.
    rule
        When a task has had enough, by role.

    Raises
    ------
    ValueError
        When two tasks have the same id, or the same row and role; when there is no rule for a role.
    """

    def __init__(self, tasks: Sequence[Task], rule: Mapping[str, Rule]) -> None:
        self.tasks = tuple(tasks)
        self._rules = dict(rule)
        self._outcomes: dict[str, list[Outcome | None]] = {}
        self._in_flight: int | None = None  # None: not started
        rows: set[tuple[str, str]] = set()
        for task in self.tasks:
            if task.id in self._outcomes or (task.row_id, task.role) in rows:
                raise ValueError(f"task {task.id} is there twice (row {task.row_id}, role {task.role})")
            if task.role not in self._rules:
                raise ValueError(
                    f"task {task.id} has the role {task.role!r}, for which there is no rule; "
                    f"there are rules for {', '.join(sorted(self._rules)) or 'none'}"
                )
            self._outcomes[task.id] = []
            rows.add((task.row_id, task.role))

    def start(self) -> list[Attempt]:
        """The first attempts of all tasks, in order. To be called once."""
        assert self._in_flight is None, "a queue starts once"
        self._in_flight = 0
        return [attempt for task in self.tasks for attempt in self._draw(task)]

    def finished(self, attempt: Attempt, outcome: Outcome) -> list[Attempt]:
        """Take an outcome in; what is to be drawn because of it, to go straight back into the running batch.

        Raises
        ------
        ValueError
            When the attempt was never drawn, or has finished before.
        """
        outcomes = self._outcomes.get(attempt.task.id, [])
        if not 0 <= attempt.number < len(outcomes):
            raise ValueError(f"attempt {attempt.id} was never drawn")
        if outcomes[attempt.number] is not None:
            raise ValueError(f"attempt {attempt.id} has finished before")
        assert self._in_flight
        outcomes[attempt.number] = outcome
        self._in_flight -= 1
        return self._draw(attempt.task)

    @property
    def done(self) -> bool:
        """True when all tasks have had enough or are exhausted."""
        return self._in_flight == 0

    def history(self, task: Task) -> Sequence[Outcome]:
        """The outcomes of a task's attempts by number (V7). The task must be done."""
        outcomes = [outcome for outcome in self._outcomes[task.id] if outcome is not None]
        assert len(outcomes) == len(self._outcomes[task.id]), f"task {task.id} is still being drawn"
        return outcomes

    def kept(self, task: Task) -> tuple[int, ...]:
        """Numbers of a task's attempts that count; the task must be done."""
        return self._rules[task.role].kept(self.history(task))

    def exhausted(self) -> list[Task]:
        """Tasks that ended without what they should have, in order (V4); the queue must be done."""
        assert self.done, "some tasks are still being drawn"
        return [task for task in self.tasks if self._rules[task.role].verdict(self.history(task)) == "exhausted"]

    def _draw(self, task: Task) -> list[Attempt]:
        assert self._in_flight is not None
        outcomes = self._outcomes[task.id]
        first, wanted = len(outcomes), self._rules[task.role].wanted(outcomes)
        outcomes += [None] * wanted
        self._in_flight += wanted
        return [Attempt(task, number) for number in range(first, first + wanted)]
