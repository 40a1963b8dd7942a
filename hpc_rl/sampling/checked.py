"""A recipe's source as it is sampled from: its prompts and stops are checked, and long prompts are cut or left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hpc_rl.config.modeling import ModelConfig
from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines.base import Completion, Prompt, Sampling
from hpc_rl.sampling.prompts import CheckedPrompts, check_prompts
from hpc_rl.sampling.rules import Outcome, Rule
from hpc_rl.sampling.source import Source
from hpc_rl.sampling.tasks import Task


def check_source(
    source: Source, shards: int, folder: str, model: ModelConfig, options: SamplingConfig
) -> CheckedSource:
    """Check all prompts of a round, and its stops, before there is an engine.

    Of the tasks of all shards one shard's are in memory at a time.

    Parameters
    ----------
    source
        A recipe's.
    shards
        How many the round has.
    folder
        Of the model that reads the prompts.
    model, options
        Pixel limits and variables of the chat template; longest input, and what becomes of prompts that leave no room
        for a completion.

    Returns
    -------
    CheckedSource
        The same tasks, those with long prompts as `sample.long_prompts` says.

    Raises
    ------
    PromptError, ModelFolderError
        See `check_prompts`.
    """
    checked = check_prompts(
        _prompts(source, shards),
        folder,
        source.sampling,
        max_model_len=options.max_model_len,
        min_pixels=model.pixels[0],
        max_pixels=model.pixels[1],
        how=options.long_prompts,
        variables=model.chat_template_kwargs,
    )
    return CheckedSource(source, checked)


def _prompts(source: Source, shards: int) -> Iterator[tuple[str, Prompt]]:
    return ((task.row_id, task.prompt) for shard in range(shards) for task in source.tasks(shard))


class CheckedSource:
    """See `check_source`, and `hpc_rl.sampling.source.Source`."""

    def __init__(self, source: Source, checked: CheckedPrompts) -> None:
        self._source, self._checked = source, checked
        self.rules: Mapping[str, Rule] = source.rules
        self.sampling: Sampling = source.sampling

    def tasks(self, shard: int) -> Sequence[Task]:
        """See `Source.tasks`."""
        fitted = ((task, self._checked.fit(task.row_id, task.prompt)) for task in self._source.tasks(shard))
        return [replace(task, prompt=prompt) for task, prompt in fitted if prompt is not None]

    def dropped(self, shard: int) -> int:
        """See `Source.dropped`: those that the recipe leaves out, and those that are too long."""
        too_long = self._checked.dropped
        rows = {task.row_id for task in self._source.tasks(shard) if task.row_id in too_long} if too_long else ()
        return self._source.dropped(shard) + len(rows)

    def judge(self, task: Task, completion: Completion) -> Outcome:
        """See `Source.judge`."""
        return self._source.judge(task, completion)
