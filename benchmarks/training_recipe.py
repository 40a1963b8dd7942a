"""A recipe that trains a model in one way on made-up token ids and does nothing else: see benchmarks/training.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from hpc_rl.config.base import PositiveInt, Section
from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.training import DpoTrainConfig, GrpoTrainConfig, SftTrainConfig, TrainConfig
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.training.task import Data, TrainTask

FILES = {"sft": "texts.parquet", "dpo": "pairs.parquet", "grpo": "graded.parquet"}
GROUP = 4
"""Samples of one prompt."""


class DataConfig(Section):
    """What is trained on: every row as long as every other, so that all batches are alike."""

    prompt_tokens: PositiveInt = 64
    """Of each row."""
    completion_tokens: PositiveInt = 64
    """Of each row; a pair has two completions."""
    steps: PositiveInt = 12
    """Optimizer steps that it makes."""


class TrainingConfig(Config):
    """A run, a model, data, and how it is trained."""

    stage_names: ClassVar[tuple[str, ...] | None] = ("data", *FILES, "advance")
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {name: (name,) for name in FILES}

    model: TrainedModelConfig
    """The model."""
    data: DataConfig = DataConfig.model_construct()
    """What it is trained on."""
    sft: SftTrainConfig = SftTrainConfig.model_construct()
    """Supervised fine-tuning."""
    dpo: DpoTrainConfig = DpoTrainConfig.model_construct()
    """Pairs."""
    grpo: GrpoTrainConfig = GrpoTrainConfig.model_construct()
    """Stored rollouts."""


CONFIG = TrainingConfig


def stages(config: TrainingConfig, round: int) -> Iterable[Stage]:
    """The data, and a training for each algorithm; nothing in round 0."""
    if round == 0:
        return
    data = StageId(round, "data")
    yield Stage(data, "benchmarks.training_body", Kind.SINGLE)
    for name in FILES:
        yield Stage(StageId(round, name), "jobs.train", Kind.MULTINODE, needs=(data,))


def training(config: TrainingConfig, stage: StageId) -> TrainTask:
    """The training of a stage."""
    settings: TrainConfig = getattr(config, stage.name)
    return TrainTask(
        algorithm=stage.name,
        settings=settings,
        section=stage.name,
        role=Role(stage.name, config.model, stage.name),
        trained_round=0,
        data=Data(StageId(stage.round, "data"), FILES[stage.name]),
        sampling=SampleConfig(samples_per_prompt=GROUP, max_tokens=config.data.completion_tokens),
        groups=units(config, stage.name) // GROUP,
        rewards={"accuracy": 1.0},
    )


def units(config: TrainingConfig, algorithm: str) -> int:
    """How many rows of data fill the steps of one rank."""
    settings: TrainConfig = getattr(config, algorithm)
    return config.data.steps * settings.per_device_batch_size * settings.gradient_accumulation_steps
