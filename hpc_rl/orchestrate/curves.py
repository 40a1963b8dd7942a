"""Curves of a whole run, a point for each round: in TensorBoard's `tb/run`, and in W&B where the config asks for it.

The steps of one training are curves of their own, in `tb/round_RR`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.job import Job
from hpc_rl.orchestrate.sampled import summarise


def write(job: Job, scalars: Mapping[str, float]) -> None:
    """Points of the job's round, by their curves' names (`evaluate/accuracy`), where the config wants TensorBoard.

    To be called before the commit: written twice they do no harm, those that are missing would stay missing.
    """
    if not job.config.logging.tensorboard:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    suffix = f".{job.stage.name}-{job.round:02d}"
    writer = EventFileWriter(str(job.ws.tb_dir / "run"), filename_suffix=suffix)  # not torch's: light jobs have none
    try:
        for name, value in scalars.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=float(value))])
            writer.add_event(Event(wall_time=time.time(), step=job.round, summary=summary))
    finally:
        writer.close()


def of_sampling(job: Job, stage: str) -> dict[str, float]:
    """What the round's sampling was like, for curves beside those of what came of it; none where no job sampled."""
    sampling = job.graph.by_id.get(StageId(job.round, stage))
    sampled = summarise(job.ws, sampling) if sampling is not None else None
    return {} if sampled is None else {f"sampling/{name}": value for name, value in sampled.to_scalars().items()}


def find_wandb(config: Config) -> Any:
    """The wandb package where the config asks for it, else None.

    Raises
    ------
    RuntimeError
        When it is not installed: before any work is done.
    """
    if not config.logging.wandb.enabled:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise RuntimeError(
            "logging.wandb.enabled is true and wandb is not installed: pip install wandb in the evaluate stage's "
            "environment, or set logging.wandb.enabled: false"
        ) from error


def write_wandb(wandb: Any, job: Job, scalars: Mapping[str, float]) -> None:
    """One more step of the W&B run `<run name>-evaluate`; offline unless the config says so. None writes nothing."""
    if wandb is None:
        return
    options = job.config.logging.wandb
    folder = options.dir or job.ws.root / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{job.config.run.name}-evaluate"
    with wandb.init(
        project=options.project, mode=options.mode, dir=str(folder), id=name, name=name, resume="allow"
    ) as run:
        run.log(dict(scalars), step=job.round)
