"""What claiming gains when tasks start at different times, and what it costs: 64 shards, 8 tasks, half of them late.

    python -m benchmarks.claiming [--seconds 3]

On the test cluster (tests/slurm), 8 nodes with one CPU each, and a task of the array for each. Four of the nodes are
busy with other jobs for three times a task's equal share of the work, so their tasks start late. (Each element is bound
to its node; else Slurm would start the late ones where others have ended, which is no situation of a busy cluster.) In
this situation, one after the other in one run:

    claimed  the tasks claim shard after shard (`job.shards`); those that start first do most
    static   each task does an equal block of 8 shards; submitted in the same way, without claims

A shard's work is a fixed time of waiting, as for a GPU: this machine has fewer cores than the array has tasks. A
makespan is the time from sbatch to the last manifest; ideal is the same work without any cost, done by all nodes that
are free: work / capacity over time.

Prints makespans, shards by task, and what the claimed side asked of the file system's server: metadata operations a
shard (strace of all tasks, in the stage's folder, from the gate to the end) and inodes a shard. Ends with status 1 when
a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claiming_stage import SHARDS, TASKS
from hpc_rl import config as configs
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from tests.orchestrate import operations
from tests.slurm.bringup import why_unavailable
from tests.slurm.cluster import SlurmCluster
from tests.slurm.hosts import wait_for

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "benchmarks" / "claiming.yaml"
LATE = TASKS // 2
MOST_OF_STATIC, MOST_OF_IDEAL = 0.6, 1.2
MOST_OPERATIONS, MOST_INODES = 8, 3

JOB = """#!/bin/bash
exec srun {before} {python} -m benchmarks.claiming_stage --workspace {workspace} --round 1 --stage work
"""
BLOCKER = """#!/bin/bash
until [ -e {free} ]; do sleep 0.1; done
"""


@dataclass(frozen=True)
class Side:
    """One side's result: seconds from sbatch to the last manifest, and who did how many shards."""

    makespan_s: float
    shards_by_task: Counter[str]
    folder: Path
    trace: Path


def run(cluster: SlurmCluster, folder: Path, seconds: float, static: bool) -> Side:
    """The stage with half of the nodes busy, static or claimed."""
    folder.mkdir()
    ws = open_run(configs.load(CONFIG, [], {}, folder / "run", cwd=folder), CONFIG).ws
    trace = folder / "trace-$SLURM_ARRAY_TASK_ID"
    before = " ".join(operations.traced(trace)) if not static and operations.why_not() is None else ""
    (folder / "job.sh").write_text(JOB.format(before=before, python=sys.executable, workspace=ws.root))
    free = folder / "free"
    (folder / "blocker.sh").write_text(BLOCKER.format(free=free))
    for node in cluster.nodes[LATE:]:
        cluster.sbatch("--time=30", "--output=/dev/null", f"--nodelist={node}", "blocker.sh", cwd=folder)
    wait_for(lambda: len(cluster.queue("--states=RUNNING")) == LATE, "the late nodes to be busy", 60)
    until_free = threading.Timer(late_s(seconds), free.touch)
    until_free.start()
    began = time.monotonic()
    environment = {"PYTHONPATH": str(REPOSITORY), "SECONDS_PER_SHARD": f"{seconds}"} | (
        {"STATIC": "1"} if static else {}
    )
    for task, node in enumerate(cluster.nodes):
        options = (f"--array={task}", f"--nodelist={node}", "--time=30", "--output=%a.out")
        cluster.sbatch(*options, "job.sh", cwd=folder, env=environment)
    wait_for(lambda: len(manifest.done_shards(ws, 1, "work")) == SHARDS, "all shards", 40 * share_s(seconds), 0.05)
    makespan_s = time.monotonic() - began
    until_free.cancel()
    free.touch()
    cluster.wait_for_empty_queue(120)
    by_task = Counter(str(manifest.read(ws, 1, "work", shard).metrics["task"]) for shard in range(SHARDS))
    return Side(makespan_s, by_task, Workspace(ws.root).stage_dir(1, "work"), folder / "trace")


def share_s(seconds: float) -> float:
    """A task's equal share of the work."""
    return seconds * SHARDS / TASKS


def late_s(seconds: float) -> float:
    """For how long the late nodes are busy."""
    return 3 * share_s(seconds)


def ideal_s(seconds: float) -> float:
    """Makespan of the work, divided as one likes, on nodes of which `LATE` come late: work / capacity over time."""
    work, at_first = seconds * SHARDS, (TASKS - LATE) * late_s(seconds)
    return work / (TASKS - LATE) if work <= at_first else late_s(seconds) + (work - at_first) / TASKS


def verdict(name: str, value: float, most: float) -> bool:
    """Print a figure beside its target; True when it meets it."""
    print(f"{name} = {value:.2f}, target at most {most}: {'met' if value <= most else 'MISSED'}")
    return value <= most


def costs(side: Side) -> list[bool]:
    """Operations and inodes a shard of the claimed side, against their targets."""
    found = Counter[str]()
    for task in range(TASKS):
        found += operations.count(side.trace.with_name(f"trace-{task}"), side.folder)
    inodes = {path.stat().st_ino for path in side.folder.rglob("*")}
    each = ", ".join(f"{name} {number / SHARDS:.2f}" for name, number in found.most_common())
    print(f"metadata operations a shard: {each}")
    return [
        verdict("metadata operations a shard", found.total() / SHARDS, MOST_OPERATIONS),
        verdict("inodes a shard", len(inodes) / SHARDS, MOST_INODES),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all targets are met, 1 when not, 2 when there can be no cluster or no strace here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claiming", description="Makespan and cost of claims.")
    parser.add_argument("--seconds", type=float, default=3.0, help="work of a shard (default: %(default)s)")
    seconds = parser.parse_args(argv).seconds
    if reason := why_unavailable() or operations.why_not():
        print(reason, file=sys.stderr)
        return 2
    # the cluster's folder beside ours, not below: munge wants one that is open to all
    with (
        tempfile.TemporaryDirectory() as folder,
        SlurmCluster(Path(f"{folder}-cluster"), nodes=TASKS, gpus=0, cpus=1, mem_mb=1000) as cluster,
    ):
        sides = {}
        for name, static in (("claimed", False), ("static", True)):
            sides[name] = side = run(cluster, Path(folder) / name, seconds, static)
            shards = ", ".join(str(side.shards_by_task[str(task)]) for task in range(TASKS))
            print(f"  {name:<8} {side.makespan_s:6.1f} s; shards by task: {shards}", flush=True)
        print(f"  {'ideal':<8} {ideal_s(seconds):6.1f} s; the late nodes are free after {late_s(seconds):.1f} s\n")
        claimed = sides["claimed"]
        met = [
            verdict("claimed / static", claimed.makespan_s / sides["static"].makespan_s, MOST_OF_STATIC),
            verdict("claimed / ideal", claimed.makespan_s / ideal_s(seconds), MOST_OF_IDEAL),
            *costs(claimed),
        ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
