"""Job body of the reference stage: log-probabilities of a round's units under the model that training is measured to.

A shard scores the data's shard of the same number, or, where the data has another number of shards, a share of all
units in their order. It becomes `reference.parquet`: `unit_id` and `logprobs`, of a sample one for each sampled token,
of a pair the sums over its chosen and its rejected completion.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rl import recipes
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.manifest import StoredManifest
from hpc_rl.training.task import TrainTask

if TYPE_CHECKING:
    from hpc_rl.training.algorithms import Scored
    from hpc_rl.training.data.units import Units
    from hpc_rl.training.logprobs import Loaded
    from hpc_rl.training.run import TrainRun

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.reference --workspace W --round R`, an array task; all on one GPU, or on the CPU."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    job = open_job("reference", argv)
    task = _task(job)
    from hpc_rl.engines.gpus import check_gpus
    from hpc_rl.training.ranks.leaving import Leaving

    check_gpus(job.config, job.stage.name)
    with Leaving() as leaving, ExitStack() as block:
        kept = _Kept(block)
        for shard in job.shards():
            _score(_run(job, task, shard, leaving), shard, kept)
    return 0


@dataclass
class _Kept:
    """What a task keeps for all of its shards.

    Attributes
    ----------
    block
        What is to end with the task.
    model
        Loaded in `block` with the first shard that has anything to score.
    every
        All units of the round, read with the first shard that scores a share of them.
    """

    block: ExitStack
    model: Loaded | None = None
    every: Units[Any] | None = None


def _task(job: Job) -> TrainTask:
    """The training of the round that asked for this stage."""
    recipe = recipes.load(job.config.recipe)
    for stage in job.graph.of_round(job.round):
        if stage.job == "jobs.train":
            task = recipe.training(job.config, stage.id)
            if task.reference is not None and task.reference.stage == job.stage.id:
                return task
    raise ValueError(f"no training of {job.config.recipe} has {job.stage.id} for its reference")


def _run(job: Job, task: TrainTask, shard: Shard, leaving: Any) -> TrainRun:
    from hpc_rl.engines.memory import notches_of
    from hpc_rl.engines.weights import weights_of
    from hpc_rl.training import memory
    from hpc_rl.training.ranks.distributed import World
    from hpc_rl.training.run import Places, TrainRun

    assert shard.lease is not None, "an array's shards are claimed"
    task = memory.lowered_task(task, notches_of(job.ws, job.round, job.stage.name))
    places = Places(
        checkpoints=job.folder, final=job.folder, tensorboard=None, token=shard.lease.token, output=shard.output,
        debug=None,
    )  # fmt: skip
    # one process does all, without ranks to share an optimizer step with
    task = replace(task, settings=task.settings.model_copy(update={"gradient_accumulation_steps": 1}))
    start = weights_of(job.ws, task.role, task.trained_round)
    return TrainRun(job, task, World(), leaving, start, places, shard.progress, shard.still_ours)


def _score(run: TrainRun, shard: Shard, kept: _Kept) -> None:
    """Score a shard, and commit it; one without anything to train on has an output without rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hpc_rl.training import algorithms, logprobs
    from hpc_rl.training.errors import NothingToLearn

    algorithm, began = algorithms.load_scored(run.task.algorithm), time.monotonic()
    weights = algorithm.reference_weights(run)
    rows: dict[str, Any] = {}
    try:
        units = _units(run, shard, kept, algorithm)
    except NothingToLearn as nothing:
        log.info("shard %d: %s", shard.index, nothing)
    else:
        shard.progress(0, len(units))
        if len(units):
            scoring = algorithm.scoring(run, units)
            kept.model = kept.model or kept.block.enter_context(logprobs.load(run, weights, scoring))
            for _, ids, values in logprobs.score(kept.model, scoring):
                rows.update(zip(ids, values, strict=True))
    path = shard.output("reference.parquet")
    pq.write_table(pa.table([list(rows), list(rows.values())], schema=_schema(pa)), path)
    seconds = {"seconds": round(time.monotonic() - began, 2)}
    shard.commit([path], made_from={"weights": weights.hash}, metrics={"units": len(rows), **seconds})


def _units(run: TrainRun, shard: Shard, kept: _Kept, algorithm: Scored) -> Units[Any]:
    """What a shard is to score."""
    data, job = run.task.data, run.job
    assert data is not None, "what is scored is what is trained on"
    names = [data.file, *([run.task.validation] if run.task.validation else [])]

    def files(every: Iterable[StoredManifest]) -> Iterator[Path]:
        return (made.path(name) for made in every for name in names)

    if job.graph[data.stage].shards == job.stage.shards:
        return algorithm.units_of(run, files([job.input(data.stage.round, data.stage.name, shard.index)]))
    if kept.every is None:
        kept.every = algorithm.units_of(run, files(job.inputs(data.stage.round, data.stage.name)))
    return kept.every.part(shard.index, job.stage.shards)


def _schema(pa: Any) -> Any:
    return pa.schema([("unit_id", pa.string()), ("logprobs", pa.list_(pa.float32()))])


if __name__ == "__main__":
    sys.exit(main())
