"""1 million samples in 10 000 shards: what each reader of a round takes in memory, and a shard on disk.

    python -m benchmarks.million [--samples 1000000] [--shards 10000] [--tokens 40] [--keep FOLDER]

Makes the workspace of a Lewis run, and goes through one round of it, each side in a process of its own:

    sample   one sampling task: prompts that are checked, claims, the real stream, published shards. Its engine has no
             model: it draws tokens at random (a million completions of the tiny model would take hours on two cores).
             vLLM's libraries are in the process where they are installed; no vLLM engine runs, so its weights, caches
             and queues are not in these numbers. They do not depend on how many samples a round has.
    grade    the real grading job, but for the listener, which is another process: its answers are random too.
    train    all that the training job reads: samples, the plan, every batch of one rank of 8. No model.
    report, status    the commands, over what is there by then.

Of pictures only headers are read. Prints seconds, memory (peak, and how much of it the libraries had taken before any
data was read), inodes and bytes per shard of the sample stage and of the grade stage. Exit status 1 when a side takes
more than 1.5 GB, or the sample stage more than 3 inodes a shard.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.lewis import GameRow, write_rows
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.recipes import lewis
from hpc_rl.run.code import source_root

CONFIG = "configs/tiny/lewis.yaml"
GROUP = 4
SIDES = ("sample", "grade", "train", "report", "status")
MOST_MB = 1500.0
MOST_INODES = 3.0


def make(root: Path, samples: int, shards: int, tokens: int) -> None:
    """A run whose data set is there, and whose first round is to be sampled."""
    prompts = ceil(samples / GROUP)
    settings = [
        "data.categories=[ring, square]", f"data.train_rows={prompts}", f"sample.samples_per_prompt={GROUP}",
        f"sample.prompts_per_round={prompts}", f"sample.shard_size={ceil(prompts / shards)}",
        f"sample.max_tokens={tokens}", "run.linger_s=1",
    ]  # fmt: skip
    loaded = configs.load(source_root() / CONFIG, settings, {}, root, cwd=source_root())
    assert isinstance(loaded, LewisConfig)
    open_run(lewis.resolve(loaded), source_root() / CONFIG)
    prepare, job = load(root, 0, "prepare"), load(root, 0, "dataset")
    prepare.folder.mkdir(parents=True)
    for shard in prepare.shards():
        shard.commit([], made_from={})
    job.folder.mkdir(parents=True)
    for shard in job.shards():
        path = job.ws.dataset_dir(0) / "train.parquet"
        path.parent.mkdir(parents=True)
        rows = [_row(number, loaded.data.speaker_problem) for number in range(prompts)]
        write_rows(path, rows)
        shard.commit([path], made_from={})
    for image in sorted({row.image for row in rows}):
        (job.ws.images_dir / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 56)).save(job.ws.images_dir / image)


def _row(number: int, problem: str) -> GameRow:
    category, concept = ("ring", "square")[number % 2], f"concept{number % 97}"
    views = tuple(f"{category}/{concept}/{view}.png" for view in range(4))
    return GameRow(
        f"{category}-{concept}-{number}", views[0], views[1:], ("A", "B", "C"), problem, "A", 0, category, concept
    )


def run(side: str, *roots: Path) -> list[dict[str, Any]]:
    """One side of one round after the other, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.million_sides", side, *map(str, roots)]
    done = subprocess.run(command, cwd=source_root(), stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()[-len(roots) :]]


def footprint(folder: Path) -> tuple[int, int]:
    """Inodes and bytes below a folder, without the folder itself."""
    stats = [path.lstat() for path in folder.rglob("*")]
    return len({stat.st_ino for stat in stats}), sum(stat.st_size for stat in stats)


def measure(root: Path, shards: int) -> bool:
    """Run all sides and print what they took; True when all bounds are kept."""
    print(f"{'side':<8} {'seconds':>9} {'peak':>10} {'before data':>12}")
    kept = True
    for side in SIDES:
        (found,) = run(side, root)
        kept = kept and found["peak_mb"] <= MOST_MB
        rest = {name: value for name, value in found.items() if name not in ("seconds", "before_mb", "peak_mb", "said")}
        said = ", ".join(f"{name} {value}" for name, value in rest.items())
        took = f"{found['seconds']:>7.1f} s {found['peak_mb']:>7.0f} MB {found['before_mb']:>9.0f} MB"
        print(f"{side:<8} {took}  {said}", flush=True)
        if side == "report":
            print("\n" + found["said"].strip() + "\n")
    for stage in ("sample", "grade"):
        inodes, size = footprint(load(root, 1, stage).folder)
        print(f"{stage}: {inodes / shards:.3f} inodes and {size / shards:,.0f} bytes a shard")
        kept = kept and (stage != "sample" or inodes / shards <= MOST_INODES)
    print(f"at most {MOST_MB:.0f} MB a process and {MOST_INODES:.0f} inodes a shard: {'met' if kept else 'MISSED'}")
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the bounds are kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=40, help="mean length of a completion (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="make the workspace there, and leave it")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary) / "run"
        make(root, arguments.samples, arguments.shards, arguments.tokens)
        return 0 if measure(root, arguments.shards) else 1


if __name__ == "__main__":
    sys.exit(main())
