"""A recipe that trains one small model in every way there is, each in a stage of its own, on a few sums.

It is also the shortest example of training in a recipe of your own: a config with a model and a section per training, a
stage whose body is `jobs.train`, and `training`, which says what that trains. The data are parquet files with the
columns of `hpc_rl.training.data.texts`, `pairs`, `solutions` and `rollouts`; tests/training/algorithms_body.py writes
some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.training import (
    DpoTrainConfig,
    GrpoTrainConfig,
    JointTrainConfig,
    RewardTrainConfig,
    RlooTrainConfig,
    SftTrainConfig,
    TrainConfig,
    WeightedSftTrainConfig,
)
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.training import memory
from hpc_rl.training.task import Data, TrainTask

FILES = {
    "sft": "texts.parquet",
    "weighted_sft": "texts.parquet",
    "dpo": "pairs.parquet",
    "grpo": "graded.parquet",
    "rloo": "graded.parquet",
    "reward_model": "solutions.parquet",
    "joint": "graded.parquet",
}
"""What each algorithm is trained on."""
PROMPTS, SAMPLES = 9, 4


class AlgorithmsConfig(Config):
    """A run, a model, and how each algorithm trains it."""

    stage_names: ClassVar[tuple[str, ...] | None] = ("data", *(f"train_{name}" for name in FILES), "advance")
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {f"train_{name}": (name,) for name in FILES}

    model: TrainedModelConfig
    """The model that each begins with."""
    algorithms: tuple[str, ...] = tuple(FILES)
    """Those that there is a stage for."""
    sft: SftTrainConfig = SftTrainConfig.model_construct()
    """Imitating texts."""
    weighted_sft: WeightedSftTrainConfig = WeightedSftTrainConfig.model_construct()
    """The same with weights."""
    dpo: DpoTrainConfig = DpoTrainConfig.model_construct()
    """Preferring answers to others."""
    grpo: GrpoTrainConfig = GrpoTrainConfig.model_construct()
    """Rewards of a group of samples, compared with each other."""
    rloo: RlooTrainConfig = RlooTrainConfig.model_construct()
    """The same, each with the mean of the others."""
    reward_model: RewardTrainConfig = RewardTrainConfig.model_construct()
    """Scoring solutions."""
    joint: JointTrainConfig = JointTrainConfig.model_construct()
    """GRPO and a reward model at once."""


CONFIG = AlgorithmsConfig


def stages(config: AlgorithmsConfig, round: int) -> Iterable[Stage]:
    """The data, and a training for each algorithm; nothing in round 0."""
    if round == 0:
        return
    data = StageId(round, "data")
    yield Stage(data, "tests.training.algorithms_body", Kind.SINGLE)
    for name in config.algorithms:
        settings: TrainConfig = getattr(config, name)
        yield Stage(
            StageId(round, f"train_{name}"), "jobs.train", Kind.MULTINODE, needs=(data,),
            notches=memory.most_notches(settings), way_out=memory.way_out(name),
        )  # fmt: skip


def training(config: AlgorithmsConfig, stage: StageId) -> TrainTask:
    """The training of a stage: always of the model that the run begins with."""
    (name,) = config.train_sections[stage.name]
    data = StageId(stage.round, "data")
    joint = name == "joint"
    return TrainTask(
        algorithm=name,
        settings=getattr(config, name),
        section=name,
        role=Role(name, config.model, stage.name),
        trained_round=0,
        data=Data(data, FILES[name]),
        validation="validation.parquet" if name == "dpo" else None,
        second=Role("judge", config.model, stage.name) if joint else None,
        second_data=Data(data, "solutions.parquet") if joint else None,
        # of rollouts
        sampling=SampleConfig(samples_per_prompt=SAMPLES, max_tokens=8),
        groups=PROMPTS,
        rewards={"correctness": 1.0, "score": 1.0} if joint else {"accuracy": 1.0},
    )
