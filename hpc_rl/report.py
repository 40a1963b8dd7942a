"""`python -m hpc_rl.report WORKSPACE`: what the run achieved and what it cost, from its manifests and end records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.orchestrate.reconcile import Run, end_records
from hpc_rl.run import manifest
from hpc_rl.run.manifest import StoredManifest


@dataclass(frozen=True)
class Cost:
    """What a stage used over all its attempts, lost ones included. Seconds."""

    wall_s: float
    cpu_s: float
    gpu_s: float


def manifests(run: Run, round: int, stage: str) -> list[StoredManifest]:
    """The manifests that a stage has so far."""
    return [manifest.read(run.ws, round, stage, shard) for shard in sorted(manifest.done_shards(run.ws, round, stage))]


def costs(run: Run) -> dict[str, Cost]:
    """Cost by stage name, over all rounds."""
    found: dict[str, list[float]] = {}
    for stage in run.graph.stages:
        for end in end_records(run.ws, stage.id):
            sums = found.setdefault(stage.name, [0.0, 0.0, 0.0])
            for at, value in enumerate((end.ended - end.started, end.cpu_s, end.gpu_s)):
                sums[at] += value
    return {name: Cost(*sums) for name, sums in found.items()}


def show(run: Run) -> None:
    """Print both tables."""
    print(f"\n{run.config.run.name}: {run.ws.root}\n")
    print(accuracy_table(run))
    print("\ntime by stage, all attempts (wall: summed over tasks)")
    print(f"  {'stage':<20} {'wall':>9} {'CPU':>9} {'GPU':>9}")
    for name, cost in costs(run).items():
        print(f"  {name:<20} {cost.wall_s:>7.0f} s {cost.cpu_s:>7.0f} s {cost.gpu_s:>7.0f} s")
    print()


def accuracy_table(run: Run) -> str:
    """Metrics of each round's evaluation, and the mean reward of its samples."""
    rows = []
    for round in range(run.graph.rounds + 1):
        evaluated = manifests(run, round, "evaluate")
        graded = manifests(run, round, "grade") if round else []
        if not evaluated and not graded:
            continue
        metrics = evaluated[0].metrics if evaluated else {}
        n = sum(m.metrics.get("n_samples", 0) for m in graded)
        reward = sum(m.metrics.get("reward", 0.0) * m.metrics.get("n_samples", 0) for m in graded) / n if n else None
        left_out = sum(m.metrics.get("n_left_out", 0) for m in graded)
        rows.append((round, metrics, reward, left_out))
    columns = ("accuracy_new_views", "accuracy_validation", "format_rate")
    lines = [f"{'round':>5}  {'new views':>10} {'held-out':>10} {'format':>8} {'reward':>8} {'left out':>9}"]
    for round, metrics, reward, left_out in rows:
        cells = [f"{metrics[c]:.3f}" if c in metrics else "-" for c in columns]
        shown = f"{reward:.3f}" if reward is not None else "-"
        lines.append(f"{round:>5}  {cells[0]:>10} {cells[1]:>10} {cells[2]:>8} {shown:>8} {left_out or '':>9}")
    chance = 1 / run.config.data.k if hasattr(run.config, "data") else None
    title = "identification accuracy" + (f" (chance {chance:.2f})" if chance else "")
    games = next((m for _, m, _, _ in rows if "n_new_views" in m), {})
    if games:
        title += f", {games['n_new_views']} games on new views of training concepts"
        title += f", {games['n_validation']} on held-out concepts"
    return "\n".join([title, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 when there is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.report", description="Accuracy per round, and GPU and CPU time per stage."
    )
    parser.add_argument("workspace", type=Path)
    arguments = parser.parse_args(argv)
    try:
        run = Run.load(arguments.workspace)
    except FileNotFoundError:
        print(f"error: {arguments.workspace} holds no run (no training_config.json)", file=sys.stderr)
        return 2
    show(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
