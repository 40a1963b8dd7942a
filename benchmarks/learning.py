"""Does the tiny Lewis game learn? Plays `configs/tiny/lewis.yaml` for several seeds and prints accuracy and wall time.

    python -m benchmarks.learning [--seeds 0 1 2] [--keep FOLDER]

Exit status 1 when a seed misses what the README promises: at most 0.45 before training (chance is 0.33), then at least
0.80 on new views of training concepts and 0.65 on held-out concepts. Wall times are printed, not judged.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.run import manifest

CONFIG = "configs/tiny/lewis.yaml"
START_AT_MOST, NEW_VIEWS_AT_LEAST, HELD_OUT_AT_LEAST = 0.45, 0.80, 0.65


def play(seed: int, folder: Path) -> bool:
    """One run from start to end; True when it learned as promised."""
    workspace = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "hpc_rl.launch", CONFIG, "--executor", "local"]
    began = time.monotonic()
    subprocess.run([*command, "--workspace", str(workspace), "--set", f"run.seed={seed}"], check=True)
    took_s = time.monotonic() - began
    run = Run.load(workspace)
    rounds = [manifest.read(run.ws, round, "evaluate", 0).metrics for round in range(run.graph.rounds + 1)]
    for name in ("accuracy_new_views", "accuracy_validation"):
        print(f"seed {seed} {name:<20} " + " ".join(f"{metrics[name]:.3f}" for metrics in rounds))
    print(f"seed {seed} wall {took_s:.0f} s, {rounds[-1]['n_validation']} games on held-out concepts")
    first, last = rounds[0], rounds[-1]
    return bool(
        first["accuracy_new_views"] <= START_AT_MOST
        and last["accuracy_new_views"] >= NEW_VIEWS_AT_LEAST
        and last["accuracy_validation"] >= HELD_OUT_AT_LEAST
    )


def main() -> int:
    """Returns 0 when all seeds learned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the workspaces in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        learned = {seed: play(seed, arguments.keep or Path(temporary)) for seed in arguments.seeds}
    print(" ".join(f"seed {seed}: {'learned' if ok else 'MISSED'}" for seed, ok in learned.items()))
    return 0 if all(learned.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
