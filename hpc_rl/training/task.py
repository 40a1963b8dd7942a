"""What a recipe asks of a training stage: which algorithm, on which data, from which weights. No torch in here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpc_rl.config.phases import SamplingConfig
from hpc_rl.config.training import TrainConfig
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import StageId


@dataclass(frozen=True)
class Data:
    """The outputs of a finished stage whose names end with `file`, one of each shard."""

    stage: StageId
    file: str


@dataclass(frozen=True)
class TrainTask:
    """One training of one role in one round.

    Attributes
    ----------
    algorithm
        Its name: see `hpc_rl.training.algorithms`.
    settings
        Its section of the config, and that section's name, for messages.
    role, trained_round
        What is trained, and the round whose training left its weights: 0 begins with the run's initial model.
    second, second_data
        What is trained beside it, of an algorithm that trains two models, and on what; the same round trained it last.
    data
        What it is trained on.
    validation
        Of pairs: another output of the same stage, whose pairs are only measured, before and after.
    nothing_to_learn
        What becomes of a round whose data have nothing to train on. stop: the run stops with the reason. keep: the
        stage is done, and the weights stay as they were; log and manifest say why.
    reference
        Log-probabilities under the reference model, where a stage of their own has computed them (`jobs.reference`).
    sampling, groups
        Of rollouts: how they were drawn, and of how many groups (prompts × roles); None: as many as the data have.
    rewards
        Of rollouts: weights of the parts of the reward, by their names.
    pictures
        Of data with pictures: `module:function`, called with the job; it returns a function from a row's id to its
        pictures, in the order in which the prompt has them. None: texts alone.
    live
        Of an algorithm that samples by itself: `module:function`, called with the run; a context manager that gives a
        `hpc_rl.training.algorithms.grpo_live.Game`.
    """

    algorithm: str
    settings: TrainConfig
    section: str
    role: Role
    trained_round: int
    second: Role | None = None
    second_data: Data | None = None
    data: Data | None = None
    validation: str | None = None
    nothing_to_learn: Literal["stop", "keep"] = "stop"
    reference: Data | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    groups: int | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    pictures: str | None = None
    live: str | None = None

    def __post_init__(self) -> None:
        if self.validation is not None and self.algorithm != "dpo":
            raise ValueError(f"{self.section} names {self.validation} for validation, but only dpo measures pairs")
        judge = {"reward_model": self.role, "verifier": self.role, "joint": self.second}.get(self.algorithm)
        if judge is not None and judge.model.chat_template_kwargs:
            raise ValueError(
                f"{judge.name}.chat_template_kwargs: {self.algorithm} must show solutions as the reward-model service "
                "does, and it has no variables. Remove them, and write their values into the model's "
                "chat_template.jinja where they matter"
            )


def find(name: str) -> Any:
    """What `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
