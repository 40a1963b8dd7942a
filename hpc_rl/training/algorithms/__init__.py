"""The algorithms of training, by name. Each is a module whose `train` does one training of a round, on all ranks."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

from hpc_rl.engines.weights import Weights
from hpc_rl.training.data.units import Units
from hpc_rl.training.logprobs import Scoring
from hpc_rl.training.run import Trained, TrainRun

MODULES = {
    "grpo": "grpo",
    "grpo_live": "grpo_live",
    "reward_model": "reward_model",
    "verifier": "reward_model",
    "joint": "joint",
    "rloo": "rloo",
    "rloo_live": "rloo_live",
    "sft": "sft",
    "weighted_sft": "weighted_sft",
    "dpo": "dpo",
}
"""Module of this package, by the name of its algorithm."""


class Algorithm(Protocol):
    """What an algorithm's module offers."""

    def train(self, run: TrainRun) -> Trained | None:
        """Do one training. All ranks must call it.

        None on ranks other than 0, and on rank 0 when the work was taken over meanwhile: then nothing was changed.

        Raises
        ------
        UnusableData
            When the data cannot be trained on; the message names the row.
        SystemExit
            When told to leave before the last step; a checkpoint was made.
        """


class Scored(Protocol):
    """What a module offers besides, if its algorithm measures itself to a reference (`jobs.reference`)."""

    def reference_weights(self, run: TrainRun) -> Weights:
        """The reference."""

    def units_of(self, run: TrainRun, files: Iterable[Path]) -> Units[Any]:
        """What there is to score in some shards of the data.

        Raises
        ------
        NothingToLearn
            When there is nothing in them that could be trained on.
        """

    def scoring(self, run: TrainRun, units: Units[Any]) -> Scoring:
        """What the reference is to score: these units, or a part of them, each once."""


def load_scored(name: str) -> Scored:
    """The algorithm `name`, which has a reference."""
    return cast(Scored, load(name))


def load(name: str) -> Algorithm:
    """The algorithm `name`.

    Raises
    ------
    KeyError
        When there is none; the message names those that there are.
    """
    if name not in MODULES:
        raise KeyError(f"there is no algorithm {name!r}; there are {', '.join(MODULES)}")
    return cast(Algorithm, importlib.import_module(f"hpc_rl.training.algorithms.{MODULES[name]}"))
