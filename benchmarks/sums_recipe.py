"""A recipe that samples answers to sums and does nothing else: the text side of benchmarks/sampling.py.

It is also the shortest example of sampling in a recipe of your own: a config with a model and a `sample` section, one
stage, `sampling`, which says what it samples, and a `Source` that says what is asked and what counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any, ClassVar

from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.config.schema import Config
from hpc_rl.engines.base import Completion, Prompt, Sampling
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.orchestrate.job import Job
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule
from hpc_rl.sampling.source import SampleTask
from hpc_rl.sampling.tasks import Task

ROLE = "solver"


class SumsConfig(Config):
    """A run, a model and how it is sampled."""

    stage_names: ClassVar[tuple[str, ...] | None] = ("sample", "advance")
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}

    speaker: SpeakerConfig
    """The model."""
    sample: SampleConfig = SampleConfig.model_construct()
    """Sampling answers."""


CONFIG = SumsConfig


def stages(config: SumsConfig, round: int) -> Iterable[Stage]:
    """sample, an array; nothing in round 0."""
    if round > 0:
        shards = ceil(config.sample.prompts_per_round / config.sample.shard_size)
        needs = (StageId(round - 1, "sample"),) if round > 1 else ()
        yield Stage(StageId(round, "sample"), "jobs.sample", Kind.ARRAY, needs=needs, shards=shards)


def sampling(config: SumsConfig, stage: StageId) -> SampleTask:
    """Answers of a model that is not trained."""
    return SampleTask(Role("speaker", config.speaker), 0, config.sample, "benchmarks.sums_recipe:source")


def source(job: Job) -> Sums:
    """The round's sums."""
    assert isinstance(job.config, SumsConfig)
    return Sums(job.config.sample, job.round)


class Sums:
    """One question a row, of some ten to fifty words; every answer counts (see `hpc_rl.sampling.source.Source`)."""

    def __init__(self, options: SampleConfig, round: int) -> None:
        self._options, self._round = options, round
        self.rules: Mapping[str, Rule] = {ROLE: KAccepted(options.samples_per_prompt, options.samples_per_prompt)}
        self.sampling = Sampling(options.temperature, options.max_tokens)

    def tasks(self, shard: int) -> Sequence[Task]:
        """See `Source.tasks`."""
        size, prompts = self._options.shard_size, self._options.prompts_per_round
        groups = range(shard * size, min((shard + 1) * size, prompts))
        return [
            Task(f"r{self._round:02d}-{group:06d}", ROLE, group, f"{group:06d}", Prompt.of(self._question(group)))
            for group in groups
        ]

    def dropped(self, shard: int) -> int:
        """See `Source.dropped`."""
        return 0

    def judge(self, task: Task, completion: Completion) -> Outcome:
        """See `Source.judge`."""
        return Outcome(True)

    def _question(self, group: int) -> str:
        terms = [(self._round * 31 + group * place) % 997 for place in range(1, 3 + group % 8)]
        return f"Is {' + '.join(map(str, terms))} = {sum(terms) + group % 2}? Answer yes or no."
