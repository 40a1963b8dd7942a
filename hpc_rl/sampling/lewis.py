"""Sampling in the Lewis game: the speaker describes each of the round's images, until enough descriptions count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.data.lewis import GameRow, Rows, image_root, read_rows, rows_of_round, shard_of
from hpc_rl.engines.base import Completion, Prompt, Sampling
from hpc_rl.grading.lewis import is_well_formed

if TYPE_CHECKING:
    from hpc_rl.orchestrate.job import Job
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule
from hpc_rl.sampling.tasks import Task

ROLE = "speaker"
ROLES = (ROLE,)
"""Who is asked about each row: a round has as many groups as rows times roles."""

TRIES_PER_SAMPLE = 4
"""`max_tries_per_task` where the config names none, per sample that is wanted."""


def source(job: Job) -> LewisSource:
    """The prompts of a round."""
    config = job.config
    assert isinstance(config, LewisConfig)
    (dataset,) = job.inputs(0, "dataset")
    rows = rows_of_round(
        read_rows(dataset.path("train.parquet")),
        job.round,
        prompts_per_round=config.sample.prompts_per_round,
        seed=config.run.seed,
    )
    return LewisSource(config.sample, rows, job.round, image_root(job.ws, config.data.image_root))


class LewisSource:
    """One task per row, with the role `speaker` (see `hpc_rl.sampling.source.Source`).

    Parameters
    ----------
    rows
        Those of the round, in its order.
    round
        Its number.
    images
        Folder that the paths of rows start at.
    """

    def __init__(self, sample: SampleConfig, rows: Rows, round: int, images: Path) -> None:
        self._sample, self._rows, self._round, self._images = sample, rows, round, images
        wanted = sample.samples_per_prompt
        tries = sample.max_tries_per_task or TRIES_PER_SAMPLE * wanted
        rule = KAccepted(wanted, wanted if sample.accept == "all" else tries)
        self.rules: Mapping[str, Rule] = {role: rule for role in ROLES}
        self.sampling = Sampling(sample.temperature, sample.max_tokens)

    def tasks(self, shard: int) -> Sequence[Task]:
        """See `Source.tasks`."""
        first = shard * self._sample.shard_size
        return [
            Task(f"r{self._round:02d}-{row.id}", ROLE, first + place, row.id, self._prompt(row))
            for place, row in enumerate(shard_of(self._rows, shard, self._sample.shard_size))
        ]

    def dropped(self, shard: int) -> int:
        """See `Source.dropped`."""
        return 0

    def judge(self, task: Task, completion: Completion) -> Outcome:
        """See `Source.judge`: whether all tags are there, in order (L8), where the config asks for it."""
        return Outcome(self._sample.accept == "all" or is_well_formed(completion.text))

    def _prompt(self, row: GameRow) -> Prompt:
        return Prompt.of(row.speaker_problem, self._images / row.image)
