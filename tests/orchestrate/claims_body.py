"""A task for tests of claims: several shards in hand at once, finished in any order, some given back, some done twice.

    python -m tests.orchestrate.claims_body WORKSPACE SHARDS [--hold 3] [--seconds 0.02] [--restless SEED]

Appends a line for each shard that it was the first to commit to WORKSPACE/committed. `--restless` makes it give shards
back and wait before it commits, at random.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from hpc_rl.orchestrate.job import Job, Shard, load


def job_of(workspace: Path, shards: int) -> Job:
    """The stage `cut` of the run of tests/orchestrate/shards_recipe.py, with another number of shards."""
    job = load(workspace, 1, "cut")
    return replace(job, stage=replace(job.stage, shards=shards))


def content(shard: int) -> str:
    """What the output of a shard must be, whoever made it."""
    return "".join(f"{shard} {line}\n" for line in range(200))


def finish(shard: Shard, log: int, seconds: float) -> None:
    """Write the output, slowly, and commit."""
    text = content(shard.index).encode()
    with shard.create("lines.txt") as file:
        file.write(text[:100])
        file.flush()
        time.sleep(seconds)
        file.write(text[100:])
        if shard.commit([file], made_from={"by": os.getpid()}):
            os.write(log, f"{shard.index}\n".encode())


def main() -> int:
    """Returns 0 when all shards are done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workspace", type=Path)
    parser.add_argument("shards", type=int)
    parser.add_argument("--hold", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--restless", default="")
    options = parser.parse_args()
    chance = random.Random(options.restless)
    log = os.open(options.workspace / "committed", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    held: list[Shard] = []
    with job_of(options.workspace, options.shards).claims() as claims:
        while True:
            while len(held) < options.hold and (shard := claims.next()):
                held.append(shard)
            if not held:
                if claims.all_done():
                    return 0
                if options.restless and (copy := claims.duplicate()):
                    held.append(copy)
                else:
                    time.sleep(0.02)
                continue
            shard = held.pop(chance.randrange(len(held)))
            if options.restless and chance.random() < 0.1:
                shard.abandon()
                continue
            finish(shard, log, options.seconds)
            if options.restless and chance.random() < 0.5:
                lost = claims.overtaken(held)
                held = [shard for shard in held if shard not in lost]
                for shard in lost:
                    shard.abandon()


if __name__ == "__main__":
    sys.exit(main())
