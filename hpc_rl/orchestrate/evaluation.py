"""What jobs that evaluate a model have in common: prompts that fit, an engine, and one completion of each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_rl.config.sampling_recipe import SamplingRecipeConfig
from hpc_rl.orchestrate.job import Job

if TYPE_CHECKING:
    from hpc_rl.config.modeling import ModelConfig
    from hpc_rl.engines.base import Completion, Engine, Prompt, Sampling
    from hpc_rl.engines.described import OpenedEngine
    from hpc_rl.engines.weights import Weights
    from hpc_rl.sampling.prompts import CheckedPrompts


@dataclass(frozen=True)
class Asked:
    """One completion that is wanted; `name` is that of its row, for messages."""

    name: str
    prompt: Prompt
    seed: int


def sampling_of(config: SamplingRecipeConfig) -> Sampling:
    """How an evaluation draws: at its own temperature, as long as training's samples."""
    from hpc_rl.engines.base import Sampling

    return Sampling(config.evaluate.temperature, config.sample.max_tokens)


def check_prompts(
    config: SamplingRecipeConfig, model: ModelConfig, folder: str, prompts: Iterable[tuple[str, Prompt]]
) -> CheckedPrompts:
    """Which prompts leave room for a completion, and what becomes of the others, as `sample.long_prompts` says.

    Raises
    ------
    PromptError
        For prompts that are too long or that the model cannot read, before the engine starts.
    """
    from hpc_rl.sampling import prompts as checks

    pixels = model.pixels
    return checks.check_prompts(
        prompts,
        folder,
        sampling_of(config),
        max_model_len=config.sample.max_model_len,
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        how=config.sample.long_prompts,
        variables=model.chat_template_kwargs,
    )


def open_engine(job: Job, model: ModelConfig, weights: Weights) -> OpenedEngine:
    """The engine that `evaluate.engine` names, with as much less memory as earlier attempts have found to be needed."""
    from hpc_rl.engines import opening
    from hpc_rl.engines.engine_spec import EngineSpec
    from hpc_rl.engines.memory import notches_of, note_notches

    config = job.config
    assert isinstance(config, SamplingRecipeConfig)
    notches = notches_of(job.ws, job.round, job.stage.name)
    spec = EngineSpec(config.evaluation_engine, model, config.sample, weights, job.ws.compile_cache, notches)
    engine = opening.open_engine(spec)
    note_notches(job.ws, job.round, job.stage.name, engine.description)
    return engine


def complete(engine: Engine, asked: Sequence[Asked], sampling: Sampling) -> list[Completion]:
    """One completion of each, in order.

    Raises
    ------
    ValueError
        For one whose prompt cannot be read, with the name of its row.
    """
    from hpc_rl.engines.base import Request, generate_each

    made = generate_each(engine, [(Request(one.prompt, one.seed), sampling) for one in asked])
    completions = []
    for one, completion in zip(asked, made, strict=True):
        if isinstance(completion, ValueError):
            raise ValueError(f"row {one.name}: {completion}") from completion
        completions.append(completion)
    return completions
