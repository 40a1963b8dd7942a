"""Do the tiny runs learn? Plays a recipe's `configs/tiny/RECIPE.yaml` for several seeds; prints scores and wall times.

    python -m benchmarks.learning lewis|prosetting [--seeds 0 1 2] [--keep FOLDER] [--set KEY=VALUE]

Exit status 1 when a seed misses what the README promises (`PROMISES`). Wall times are printed, not judged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.orchestrate.gate import is_complete
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.run import manifest


@dataclass(frozen=True)
class Promise:
    """By metric of the evaluate stage: at most so much before training, at least so much after the last round."""

    before: dict[str, float]
    after: dict[str, float]
    over: str
    """The metric with the number of cases."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that are promised."""
        return tuple(self.before | self.after)


PROMISES = {
    # chance is 0.33; held-out concepts are harder than new views of known ones
    "lewis": Promise(
        {"accuracy_new_views": 0.45}, {"accuracy_new_views": 0.80, "accuracy_validation": 0.65}, "n_validation"
    ),
    "prosetting": Promise({"accuracy": 0.30}, {"accuracy": 0.70}, "n_held_out"),
}


def play(recipe: str, seed: int, folder: Path, settings: Sequence[str]) -> bool:
    """One run from start to end; True when it learned as promised."""
    workspace = folder / f"{recipe}-{seed}"
    command = [sys.executable, "-m", "hpc_rl.launch", f"configs/tiny/{recipe}.yaml", "--executor", "local"]
    chosen = [part for setting in (*settings, f"run.seed={seed}") for part in ("--set", setting)]
    began = time.monotonic()
    subprocess.run([*command, "--workspace", str(workspace), *chosen], check=True)
    took_s = time.monotonic() - began
    run, promise = Run.load(workspace), PROMISES[recipe]
    ids = [StageId(round, "evaluate") for round in range(run.graph.rounds + 1)]
    rounds = [id.round for id in ids if id in run.graph.by_id and is_complete(run.ws, run.graph[id])]
    scores = [manifest.read(run.ws, round, "evaluate", 0).metrics for round in rounds]
    print(f"seed {seed} {'round':<20} " + " ".join(f"{round:5}" for round in rounds))
    for name in promise.metrics:
        print(f"seed {seed} {name:<20} " + " ".join(f"{metrics[name]:.3f}" for metrics in scores))
    print(f"seed {seed} wall {took_s:.0f} s, {promise.over} = {scores[-1][promise.over]}", flush=True)
    return all(scores[0][name] <= most for name, most in promise.before.items()) and all(
        scores[-1][name] >= least for name, least in promise.after.items()
    )


def main() -> int:
    """Returns 0 when all seeds learned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=sorted(PROMISES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the workspaces in this folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of hpc_rl.launch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        learned = {seed: play(arguments.recipe, seed, folder, arguments.set) for seed in arguments.seeds}
    print(" ".join(f"seed {seed}: {'learned' if ok else 'MISSED'}" for seed, ok in learned.items()))
    return 0 if all(learned.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
