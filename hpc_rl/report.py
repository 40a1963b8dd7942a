"""`python -m hpc_rl.report WORKSPACE`: what the run achieved and what it cost, from its manifests and end records."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.orchestrate.graph import Kind
from hpc_rl.orchestrate.reconcile import NoRun, Run, end_records
from hpc_rl.orchestrate.sampled import summarise
from hpc_rl.run import manifest
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.manifest import StoredManifest
from hpc_rl.sampling.text import text


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
    """Print all that is known."""
    print(f"\n{run.config.run.name}: {run.ws.root}\n")
    print(accuracy_table(run))
    print("\ntime by stage, all attempts (wall: summed over tasks)")
    print(f"  {'stage':<20} {'wall':>9} {'CPU':>9} {'GPU':>9}")
    for name, cost in costs(run).items():
        print(f"  {name:<20} {cost.wall_s:>7.0f} s {cost.cpu_s:>7.0f} s {cost.gpu_s:>7.0f} s")
    print()
    for line in lowered_trainings(run):
        print(line, end="\n\n")
    for stage in run.graph.work:
        sampled = summarise(run.ws, stage)
        if sampled is not None:
            print(text(f"round {stage.round} {stage.name}", sampled), end="\n\n")


def lowered_trainings(run: Run) -> Iterator[str]:
    """Trainings that ended with less in a forward pass than the config says, since memory had run out."""
    for stage in run.graph.work:
        if stage.kind is not Kind.MULTINODE:
            continue
        for made in manifests(run, stage.round, stage.name):
            if notches := made.metrics.get("memory_notches"):
                yield (
                    f"round {stage.round} {stage.name}: after running out of memory "
                    f"{'once' if notches == 1 else f'{notches} times'}, per_device_batch_size "
                    f"{made.metrics['per_device_batch_size']} and gradient_accumulation_steps "
                    f"{made.metrics['gradient_accumulation_steps']}; an optimizer step is the same"
                )


COLUMNS = {
    "new views": "accuracy_new_views",
    "held-out": "accuracy_validation",
    "true": "true_validation",
    "format": "format_rate",
    "reward": "mean_reward",
    "equal groups": "equal_groups",
    "left out": "left_out",
}
"""Column titles, and the metrics of `evaluate` and `train` below them; a column that no round has is not shown."""


def accuracy_table(run: Run) -> str:
    """What each round's evaluation and training measured."""
    rows = {}
    for round in range(run.graph.rounds + 1):
        found = [
            m.metrics
            for stage in ("train", "evaluate")
            for m in manifests(run, round, stage)
            if round or stage != "train"
        ]
        if found:
            rows[round] = {name: value for metrics in found for name, value in metrics.items()}
    shown = {title: name for title, name in COLUMNS.items() if any(name in metrics for metrics in rows.values())}
    lines = ["round  " + "  ".join(f"{title:>9}" for title in shown)]
    for round, metrics in rows.items():
        lines.append(
            f"{round:>5}  "
            + "  ".join(f"{_cell(metrics.get(name)):>{max(9, len(title))}}" for title, name in shown.items())
        )
    title = "identification accuracy"
    if any("n_validation" in metrics for metrics in rows.values()):
        games = next(metrics for metrics in rows.values() if "n_validation" in metrics)
        title += f" (chance {games['chance']:.2f}) in {games['n_new_views']} games on new views of training concepts"
        title += f" and {games['n_validation']} on held-out concepts"
    notes = {
        "true": "share of descriptions of held-out concepts that are true (rendered scenes only)",
        "reward": "mean over the round's samples, before its training",
        "equal groups": "groups whose rewards are all equal: no gradient",
        "left out": "samples that could not be scored",
    }
    return "\n".join([title, *lines, *(f"  {name}: {text}" for name, text in notes.items() if name in shown)])


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 when there is no run, or a file of it is damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.report",
        description="Accuracy per round, GPU and CPU time per stage, and what sampling achieved.",
    )
    parser.add_argument("workspace", type=Path)
    arguments = parser.parse_args(argv)
    try:
        show(Run.load(arguments.workspace))
    except (NoRun, CorruptFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    sys.exit(main())
