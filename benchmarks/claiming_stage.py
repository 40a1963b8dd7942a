"""The stage of benchmarks/claiming.py, recipe and body in one. A shard is some time of waiting and a small file.

The wait stands for a GPU at work; the machine of a benchmark has fewer cores than the stage has tasks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.orchestrate.job import Job, open_job
from hpc_rl.run import manifest
from hpc_rl.run.manifest import Manifest

SHARDS, TASKS = 64, 8
OUTPUT = b"what a shard made\n"


def stages(config: Config, round: int) -> Iterable[Stage]:
    """One array stage in each round but 0."""
    if round:
        yield Stage(StageId(round, "work"), "benchmarks.claiming_stage", Kind.ARRAY, shards=SHARDS)


def main() -> int:
    """Work on claimed shards, or with `STATIC=1` on this array element's block of them. Returns 0."""
    job, seconds = open_job("work"), float(os.environ["SECONDS_PER_SHARD"])
    if os.environ.get("STATIC"):
        work_on_block(job, int(os.environ["SLURM_ARRAY_TASK_ID"]), seconds)
        return 0
    for shard in job.shards():
        time.sleep(seconds)
        with shard.create("txt") as file:
            file.write(OUTPUT)
            shard.commit([file], made_from={}, metrics={"task": os.environ["SLURM_ARRAY_TASK_ID"]})
    return 0


def work_on_block(job: Job, task: int, seconds: float) -> None:
    """What an array without claims does: shards task × block, …, one after the other."""
    block = SHARDS // TASKS
    for shard in range(task * block, (task + 1) * block):
        time.sleep(seconds)
        path = job.folder / f"shard_{shard:04d}.txt"
        path.write_bytes(OUTPUT)
        made = (manifest.describe_output(job.ws, path),)
        manifest.write(job.ws, Manifest(job.round, job.stage.name, shard, made, metrics={"task": str(task)}))


if __name__ == "__main__":
    sys.exit(main())
