"""Stages that recipes have in common: one that samples, one that trains, one that evaluates, one with its service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hpc_rl.config.sampling_recipe import SamplingRecipeConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.training import TrainConfig
from hpc_rl.engines.memory import most_notches
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.training import memory


def sampling_stage(config: SamplingRecipeConfig, id: StageId, needs: tuple[StageId, ...], shards: int) -> Stage:
    """An array that samples what the recipe's `sampling(config, id)` says."""
    return Stage(id, "jobs.sample", Kind.ARRAY, needs=needs, shards=shards, notches=_notches(config, id))


def evaluation_stage(config: SamplingRecipeConfig, id: StageId, job: str, needs: tuple[StageId, ...]) -> Stage:
    """One job with an engine, as `evaluate` says."""
    return Stage(id, job, Kind.SINGLE, needs=needs, notches=_notches(config, id))


def training_stage(
    id: StageId, needs: tuple[StageId, ...], settings: TrainConfig, section: str, optional: bool = False
) -> Stage:
    """A training over nodes, of what the recipe's `training(config, id)` says; `section` has its settings.

    With `optional` a round is worth having without it: what follows goes on with the weights that there were before.
    """
    return Stage(
        id, "jobs.train", Kind.MULTINODE, needs=needs, optional=optional,
        notches=memory.most_notches(settings), way_out=memory.way_out(section),
    )  # fmt: skip


def with_service(config: Config, stage: Stage, service: str) -> Iterable[Stage]:
    """A stage and, before it, the service that it asks: a job that starts when the stage may, or a part of its job.

    With `services.SERVICE.client.url` the service is somebody else's and the stage stands alone.
    """
    options: Any = config.services.of(service)
    if options.client.url:
        yield stage
        return
    server = StageId(stage.round, f"{stage.name}.{service}")
    yield Stage(server, "jobs.serve", Kind.SERVICE, needs=stage.needs, shards=0, serves=(stage.id,))
    yield replace(stage, beside=(server,)) if options.placement == "hetjob" else replace(stage, uses=(server,))


def _notches(config: SamplingRecipeConfig, id: StageId) -> int:
    """How often a stage with an engine may take less memory; where it runs, it has GPUs or not."""
    stage = config.stages.get(id.name)
    engine = config.evaluation_engine if id.name == "evaluate" else config.sample.engine
    return most_notches(config.sample, engine, has_gpus=bool(stage and stage.gpus_per_node))
