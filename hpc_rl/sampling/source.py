"""What a recipe says about its sampling: the tasks of a shard, what counts, and when a task has had enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from hpc_rl.engines.base import Completion, Sampling
from hpc_rl.sampling.rules import Outcome, Rule
from hpc_rl.sampling.tasks import Task


class Source(Protocol):
    """Where tasks come from, and what their completions are worth.

    Everything it says depends on the run and the round alone: whoever asks about a shard, and when, hears the same.
    Prompts are as the recipe writes them: `jobs.sample.sample` checks those of all shards, and cuts or leaves out those
    that are too long (`hpc_rl.sampling.checked`).
    """

    @property
    def rules(self) -> Mapping[str, Rule]:
        """When a task has had enough, by role."""

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""

    def tasks(self, shard: int) -> Sequence[Task]:
        """The tasks of a shard, by group; asked for in a thread beside the one that judges.

        Each array task asks for those of all shards once, before its engine starts.
        """

    def dropped(self, shard: int) -> int:
        """Prompts of a shard that the recipe leaves out, for reports; 0 where it asks about all."""

    def judge(self, task: Task, completion: Completion) -> Outcome:
        """What one completion is worth. The batch goes on only after it: milliseconds, not seconds."""
