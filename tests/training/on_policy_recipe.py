"""A recipe that trains the model of tools/tiny_sums.py by GRPO or RLOO: samples of a round, or live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.training import GrpoTrainConfig, OnPolicyTrainConfig, RlooTrainConfig
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.recipes import reference
from hpc_rl.training.algorithms.grpo_live import Asked, Game, Parts
from hpc_rl.training.run import TrainRun
from hpc_rl.training.task import Data, TrainTask
from tools import tiny_sums

SHARDS = 2
PARTS = ("exact", "digits")


class OnPolicyConfig(Config):
    """A run, a model, and how it is trained."""

    stage_names: ClassVar[tuple[str, ...] | None] = ("graded", "reference", "train", "advance")
    array_stages: ClassVar[frozenset[str]] = frozenset({"graded", "reference"})
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("grpo",)}

    algorithm: Literal["grpo", "rloo"] = "grpo"
    """Which."""
    model: TrainedModelConfig
    """The model that is trained."""
    sample: SampleConfig = SampleConfig.model_construct()
    """Temperature, groups, lengths."""
    grpo: GrpoTrainConfig = GrpoTrainConfig.model_construct()
    """Of GRPO."""
    rloo: RlooTrainConfig = RlooTrainConfig.model_construct()
    """Of RLOO."""

    @property
    def train(self) -> OnPolicyTrainConfig:
        """Of the one that trains."""
        return self.rloo if self.algorithm == "rloo" else self.grpo


CONFIG = OnPolicyConfig


def stages(config: OnPolicyConfig, round: int) -> Iterable[Stage]:
    """Samples, which tests commit; their scores under the reference; training."""
    if round == 0:
        return
    needs: tuple[StageId, ...] = ()
    if config.train.rollouts == "round":
        before = (StageId(round - 1, "train"),) if round > 1 else ()
        graded = Stage(StageId(round, "graded"), "none", Kind.ARRAY, needs=before, shards=SHARDS)
        yield graded
        needs = (graded.id,)
        if config.train.reference == "stage":
            scored = reference.stage(graded.id, shards=SHARDS, settings=config.train)
            yield scored
            needs = (graded.id, scored.id)
    yield Stage(StageId(round, "train"), "jobs.train", Kind.MULTINODE, needs=needs)


def training(config: OnPolicyConfig, stage: StageId) -> TrainTask:
    """Of the round before's weights."""
    live = config.train.rollouts == "live"
    return TrainTask(
        algorithm=config.algorithm + "_live" * live,
        settings=config.train,
        section=config.algorithm,
        role=Role("model", config.model),
        trained_round=stage.round - 1,
        data=None if live else Data(StageId(stage.round, "graded"), "graded.parquet"),
        reference=reference.output(stage.round) if config.train.reference == "stage" else None,
        sampling=config.sample,
        groups=config.sample.prompts_per_round,
        rewards={"exact": 1.0, "digits": 0.5},
        live="tests.training.on_policy_recipe:play",
    )


def worth(said: str, sum: tiny_sums.Sum) -> tuple[float, float]:
    """Parts of the reward: the whole answer, and the share of its digits."""
    right = tiny_sums.answer(sum)
    digits = [a == b for a, b in zip(said, right, strict=False)] if len(said) == len(right) else []
    return float(said == right), len([one for one in digits if one]) / len(right)


def asked(config: OnPolicyConfig) -> list[tiny_sums.Sum]:
    """The sums of a round."""
    return tiny_sums.sums()[0][: config.sample.prompts_per_round]


@contextmanager
def play(run: TrainRun) -> Iterator[Game]:
    """Live sums."""
    config = run.job.config
    assert isinstance(config, OnPolicyConfig)
    sums = asked(config)

    written = run.places.output("judged.txt")

    def judge(said: Sequence[Asked], step: int) -> list[Parts]:
        with written.open("a") as file:
            file.writelines(f"{step} {one.row} {one.text}\n" for one in said)
        return [worth(one.text, sums[one.row]) for one in said]

    yield Game([f"{a}+{b}" for a, b in sums], [tiny_sums.question(one) for one in sums], judge, outputs=[written])
