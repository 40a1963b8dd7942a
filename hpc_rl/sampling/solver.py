"""Sampling in progressive solver training: k attempts at each question of the round's pool (systems.md S1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.config.phases import SamplingConfig
from hpc_rl.config.prosetting import ProSettingConfig, QuestionsConfig
from hpc_rl.data.questions import Question, chat, count_questions, iter_questions, shard_range
from hpc_rl.engines.base import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from hpc_rl.orchestrate.job import Job
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule
from hpc_rl.sampling.tasks import Task

ROLE = "solver"


def source(job: Job) -> SolverSource:
    """The questions of a round: the pool that the round before has made."""
    config = job.config
    assert isinstance(config, ProSettingConfig)
    pool = job.input(job.round - 1, "pool", 0).path("questions.parquet")
    return SolverSource(config.sample, config.questions, pool, job.round, job.stage.shards)


class SolverSource:
    """One task per question; every attempt counts, right or wrong (see `hpc_rl.sampling.source.Source`).

    Parameters
    ----------
    sample, questions
        How many attempts, and how a question is put.
    pool
        The round's questions, a parquet file. Of a large pool only a shard's row groups are read at a time.
    round, shards
        Its number, and into how many pieces its questions are cut. With fewer questions some have none.
    """

    def __init__(self, sample: SamplingConfig, questions: QuestionsConfig, pool: Path, round: int, shards: int) -> None:
        self._questions, self._pool, self._round, self._shards = questions, pool, round, shards
        self._number = count_questions(pool)
        attempts = sample.samples_per_prompt
        self.rules: Mapping[str, Rule] = {ROLE: KAccepted(attempts, attempts)}
        self.sampling = Sampling(sample.temperature, sample.max_tokens)

    def tasks(self, shard: int) -> Sequence[Task]:
        """See `Source.tasks`. A task's group is the place of its question in the pool."""
        places = shard_range(self._number, self._shards, shard)
        return [
            Task(f"r{self._round:02d}-{one.question_id}", ROLE, place, one.question_id, self._prompt(one))
            for place, one in zip(places, iter_questions(self._pool, places), strict=True)
        ]

    def dropped(self, shard: int) -> int:
        """See `Source.dropped`."""
        return 0

    def judge(self, task: Task, completion: Completion) -> Outcome:
        """See `Source.judge`: whether an attempt is right, a stage of its own finds out."""
        return Outcome(True)

    def _prompt(self, question: Question) -> Prompt:
        return Prompt(tuple(chat(self._questions, question.question)))
