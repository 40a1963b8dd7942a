"""What the orchestration costs: a run of jobs that do nothing, launched by us and chained by hand, in turns.

    python -m benchmarks.orchestration [--repeat 3]

On the test cluster (tests/slurm), 3 rounds × 5 stages: a 4-task array, two single jobs, a 2-node job, a single job.

    launched        python -m hpc_rl.launch benchmarks/noop.yaml, from the command to the end of the last stage:
                    code snapshot, gates, leases, manifests, advance jobs and all.
    by hand         a shell script of 15 sbatch calls, each with --dependency=afterok on the one before; every task is
                    `srun python -c pass`.
    by hand, bodies the same chain whose tasks are our job body (benchmarks/noop_body.py: gate, lease, manifest) without
                    launcher, entry process and advance jobs.

Prints every wall time, the medians and the ratios; ends with status 1 when launched / by hand is above the target.
The scheduler works on a grid of 0.5 to 1 s (docs/testing.md): a job of 0.1 s, as by hand, is followed by the next after
0.5 s, one of 0.2 to 0.9 s after 1 s. The second ratio is free of that: both its sides run jobs of the same length.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.slurm.bringup import why_unavailable
from tests.slurm.cluster import SlurmCluster
from tests.slurm.hosts import wait_for

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "benchmarks/noop.yaml"
ROUNDS = 3
STAGES = {"sample": "--array=0-3", "grade": "", "score": "", "train": "--nodes=2 --ntasks-per-node=1", "evaluate": ""}
TARGET = 1.3
PATIENCE_S = 300
POLL_S = 0.02

NO_BODY = f"{sys.executable} -c pass"
OUR_BODY = f'{sys.executable} -m benchmarks.noop_body --workspace "$PWD" --round "$ROUND" --stage "$STAGE"'

JOB = """#!/bin/bash
srun {body} || exit
[ "$ROUND $STAGE" != "{last}" ] || touch done
"""


def launched(cluster: SlurmCluster, folder: Path) -> float:
    """Wall time of the run as we launch it, in seconds."""
    began = time.monotonic()
    _launch(cluster, folder)
    attempts = folder / f"rounds/round_{ROUNDS:02d}" / list(STAGES)[-1] / "attempts"
    # the record that the last stage's entry process writes when its body has ended
    wait_for(lambda: any(attempts.glob("*.end-*.json")), "the launched run to end", PATIENCE_S, POLL_S)
    return time.monotonic() - began


def by_hand(body: str, cluster: SlurmCluster, folder: Path) -> float:
    """Wall time of the same jobs as a chain of sbatch calls, in seconds."""
    if body == OUR_BODY:
        _launch(cluster, folder, "--init")  # a workspace for the bodies; not on the clock
    folder.mkdir(exist_ok=True)
    (folder / "job.sh").write_text(JOB.format(body=body, last=f"{ROUNDS} {list(STAGES)[-1]}"))
    chain = ["set -eu", "after="]
    for round in range(1, ROUNDS + 1):
        for stage, options in STAGES.items():
            command = f"sbatch --parsable --time=5 --output=%x-%j.out --job-name={stage} {options} $after job.sh"
            chain.append(f"after=--dependency=afterok:$(ROUND={round} STAGE={stage} {command})")
    (folder / "chain.sh").write_text("\n".join(chain) + "\n")
    began = time.monotonic()
    cluster.run(["sh", "chain.sh"], cwd=folder, env={"PYTHONPATH": str(REPOSITORY)})
    wait_for((folder / "done").exists, "the chain to end", PATIENCE_S, POLL_S)
    return time.monotonic() - began


def _launch(cluster: SlurmCluster, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hpc_rl.launch", CONFIG, "--workspace", str(folder), *options]
    cluster.run([*command, "--set", f"run.rounds={ROUNDS}"], cwd=REPOSITORY, timeout_s=PATIENCE_S)


SIDES: dict[str, Callable[[SlurmCluster, Path], float]] = {
    "launched": launched,
    "by hand": partial(by_hand, NO_BODY),
    "by hand, bodies": partial(by_hand, OUR_BODY),
}


def measure(cluster: SlurmCluster, folder: Path, repeat: int) -> dict[str, list[float]]:
    """Wall times of every side in seconds, in turns, so that whatever else the machine does hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(repeat):
        for name, side in SIDES.items():
            seconds = side(cluster, folder / f"{turn}-{name.replace(', ', '-').replace(' ', '-')}")
            times[name].append(seconds)
            print(f"  {name:<16} {seconds:6.1f} s", flush=True)
            cluster.reset()  # our spare advance job, which comes after the last round
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the ratio meets the target, 1 when not, 2 when there can be no cluster here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description="Overhead of a no-op run.")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side (default: %(default)s)")
    repeat = parser.parse_args(argv).repeat
    if reason := why_unavailable():
        print(reason, file=sys.stderr)
        return 2
    # the cluster's folder beside ours, not below: munge wants one that is open to all
    with tempfile.TemporaryDirectory() as folder, SlurmCluster(Path(f"{folder}-cluster")) as cluster:
        times = measure(cluster, Path(folder), repeat)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\nwall time of {ROUNDS} rounds × {len(STAGES)} stages that do nothing, median of {repeat}:")
    for name, median in medians.items():
        print(f"  {name:<16} {median:6.1f} s")
    ratios = {name: medians["launched"] / median for name, median in medians.items() if name != "launched"}
    for name, ratio in ratios.items():
        verdict = "met" if ratio <= TARGET else "MISSED"
        print(f"launched / {name} = {ratio:.2f}, target at most {TARGET}: {verdict}")
    return 0 if ratios["by hand"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
