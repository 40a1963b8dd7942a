"""A stage that scores a round's data under the reference model before training, on as many machines as it may have.

    yield reference.stage(StageId(round, "grade"), shards=shards, settings=config.train)
    yield Stage(StageId(round, "train"), "jobs.train", Kind.MULTINODE, needs=(..., StageId(round, "reference")))

and in `training`: `TrainTask(..., reference=reference.output(round))`. Worth its while where the trained model's ranks
are few or dear: otherwise they do it themselves (`reference: pass`).
"""

from __future__ import annotations

from hpc_rl.config.training import TrainConfig
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.training import memory
from hpc_rl.training.task import Data

NAME = "reference"


def stage(
    of: StageId, *also: StageId, shards: int, settings: TrainConfig, section: str = "train", optional: bool = False
) -> Stage:
    """The stage.

    Parameters
    ----------
    of
        Whose output is trained on.
    shards
        Into how many the work is divided. As many as `of` has: each scores one of its; otherwise a share of all units.
    also
        What made the reference's weights, if a stage did that `of` does not need itself.
    settings, section
        Of the training: a forward pass is as large as there.
    optional
        As of the training, which cannot do without it.
    """
    return Stage(
        StageId(of.round, NAME), "jobs.reference", Kind.ARRAY, needs=(of, *also), shards=shards, optional=optional,
        notches=memory.most_notches(settings), way_out=memory.way_out(section),
    )  # fmt: skip


def output(round: int) -> Data:
    """What training is told of it."""
    return Data(StageId(round, NAME), "reference.parquet")
