"""What a recipe says about its sampling: which model, and where the tasks of a shard come from and what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines.base import Completion, Sampling
from hpc_rl.engines.weights import Role
from hpc_rl.sampling.rules import Outcome, Rule
from hpc_rl.sampling.tasks import Task


@dataclass(frozen=True)
class SampleTask:
    """One sampling stage: what a recipe's `sampling(config, stage)` returns.

    Attributes
    ----------
    role, trained_round
        The model that samples, and the round whose training left its weights; 0: the run's initial model.
    options
        How.
    source
        What is asked, and what counts: `module:function`, called with the job; it returns a `Source`.
    """

    role: Role
    trained_round: int
    options: SamplingConfig
    source: str


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
