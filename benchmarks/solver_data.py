"""A round of 100 000 questions × 8 attempts through grade → dpo_data → pool: rates, and memory of each job.

    python -m benchmarks.solver_data [--questions 100000] [--attempts 8] [--shards 64] [--tokens 200]
                                     [--kinds integer,fraction,…] [--bare-shards 8] [--quick] [--keep FOLDER]

Makes the workspace of a ProSetting run with the pool and the attempts of round 1 (benchmarks/solver_texts.py), then
runs the real job bodies, each in a process of its own; no teacher is asked, and a file of variants stands for enhance.
Beside them the bare checker: the same Checker over the same texts in memory, and nothing else, on some of the shards,
before the jobs and after them.

Rates are attempts per second of CPU time; of the jobs with the start of the process, of the bare checker without.
Prints them, the ratio of all three jobs together to the bare checker, and peak memory. Exit status 1 when a job takes
more than 1.5 GB, or the ratio is below 0.8. With answers that are all whole numbers (`--kinds integer`) a check takes
microseconds, less than reading and writing the attempt: the ratio is small there, and the rate high.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.solver_texts import KINDS, attempt, made, solution
from hpc_rl import config as configs
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.placing import commit_placed
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.workspace import Workspace

CONFIG = "configs/tiny/prosetting.yaml"
JOBS = ("grade", "dpo_data", "pool")
MOST_MB = 1500.0
LEAST_RATIO = 0.8
RIGHT = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.0)
"""How often attempts at a question are right, drawn per question: an eighth is never solved."""


def make(root: Path, questions: int, attempts: int, shards: int, tokens: int, kinds: Sequence[str]) -> None:
    """A run of which the first pool is there, and the attempts of round 1."""
    settings = [
        "grade.answers=math", "grade.judge=never", "grade.check_references=false",
        f"sample.samples_per_prompt={attempts}", f"sample.shards={shards}",
        "logging.tensorboard=false", "run.linger_s=1",
    ]  # fmt: skip
    loaded = configs.load(source_root() / CONFIG, settings, {}, root, cwd=source_root())
    open_run(loaded, source_root() / CONFIG)
    _make_pool(root, questions, kinds)
    _make_attempts(root, attempts, tokens, kinds)


def _make_pool(root: Path, questions: int, kinds: Sequence[str]) -> None:
    from hpc_rl.data.questions import Question, write_questions

    def one(number: int) -> Question:
        of, id = made(number, kinds), f"q{number:06d}"
        split = "validation" if number % 10 == 0 else "train"
        return Question(id, of.question, of.forms[0], solution(of), id, None, 0, "", split, "initial")  # type: ignore[arg-type]

    job = load(root, 0, "pool")
    job.folder.mkdir(parents=True, exist_ok=True)
    for shard in job.shards():
        pool, held_out = shard.output("questions.parquet"), shard.output("held_out.parquet")
        write_questions(pool, (one(number) for number in range(questions)))
        other = replace(one(0), question_id="h000001", root_id="h000001", question="Another?", split="held_out")
        write_questions(held_out, [other])
        places = {
            pool: job.ws.dataset_dir(1) / pool.name.split(".", 2)[2],
            held_out: job.ws.dataset_dir(0) / "held_out.parquet",
        }
        commit_placed(shard, places, made_from={}, metrics={})


def _make_attempts(root: Path, attempts: int, tokens: int, kinds: Sequence[str]) -> None:
    import numpy as np

    from hpc_rl.data.questions import count_questions, shard_range
    from hpc_rl.grading.samples import Sample, write_samples

    job = load(root, 1, "collect")
    job.folder.mkdir(parents=True, exist_ok=True)
    number = count_questions(manifest.read(job.ws, 0, "pool", 0).path("questions.parquet"))
    draw, numbers = random.Random(0), np.random.default_rng(0)
    for shard in job.shards():
        samples = []
        for place in shard_range(number, job.stage.shards, shard.index):
            of, share, id = made(place, kinds), draw.choice(RIGHT), f"q{place:06d}"
            for n in range(attempts):
                ids = tuple(numbers.integers(0, 150_000, tokens).tolist())
                logprobs = tuple((-numbers.random(tokens)).tolist())
                samples.append(Sample(
                    f"r01-{id}-g{n}", id, "solver", place, n, True, tuple(range(60)), ids, logprobs,
                    attempt(of, n, draw.random() < share), "stop", n, "w",
                ))  # fmt: skip
        path = shard.output("samples.parquet")
        write_samples(path, samples, Sample)
        shard.commit([path], made_from={})


def enhance(root: Path) -> None:
    """A variant of every question that some attempt solved, as enhance would write it."""
    from hpc_rl.data.questions import iter_questions, write_questions
    from hpc_rl.grading.results import iter_results

    job = load(root, 1, "enhance")
    job.folder.mkdir(parents=True, exist_ok=True)
    pool = manifest.read(job.ws, 0, "pool", 0).path("questions.parquet")
    for shard in job.shards():
        results = list(iter_results(manifest.read(job.ws, 1, "grade", shard.index).path("results.parquet")))
        places = range(results[0].place, results[-1].place + 1) if results else range(0)

        def variants(results: Any = results, places: range = places) -> Any:
            for result, question in zip(results, iter_questions(pool, places), strict=True):
                if result.right:
                    yield replace(
                        question, question_id=f"{question.question_id}.r01", question=f"Harder: {question.question}",
                        parent_id=question.question_id, made_in=1, kind="harder", reason="enhanced",
                    )  # fmt: skip

        enhanced = shard.output("enhanced.parquet")
        write_questions(enhanced, variants())
        shard.commit([enhanced], made_from={}, metrics={})


def bare(root: Path, shards: int) -> dict[str, float]:
    """The checker alone, on the texts of the first shards."""
    import pyarrow.parquet as pq

    from hpc_rl.data.questions import iter_questions
    from hpc_rl.grading.answers import Checker

    ws, checker = Workspace(root), Checker("math")
    answers = {
        one.question_id: one.answer for one in iter_questions(manifest.read(ws, 0, "pool", 0).path("questions.parquet"))
    }
    checker.verdict(checker.reference("x+1"), r"\boxed{1+x}")  # what it loads is none of its rate; of the jobs' it is
    spent, number = 0.0, 0
    for shard in range(shards):
        table = pq.read_table(
            manifest.read(ws, 1, "collect", shard).path("samples.parquet"), columns=["row_id", "text"]
        )
        rows = list(zip(table["row_id"].to_pylist(), table["text"].to_pylist(), strict=True))
        began, at, reference = time.process_time(), "", checker.reference("")
        for id, text in rows:
            if id != at:
                at, reference = id, checker.reference(answers[id])
            checker.verdict(reference, text)
        spent, number = spent + time.process_time() - began, number + len(rows)
    return {"cpu_s": spent, "attempts": number}


def side(root: Path, name: str, bare_shards: int) -> None:
    """Run one side in this process, and say what it took as a line of JSON."""
    import importlib

    taken: dict[str, float] = {}
    began = time.perf_counter()
    if name == "bare":
        taken = bare(root, bare_shards)
    else:
        body: Callable[[Sequence[str]], int] = importlib.import_module(f"jobs.prosetting.{name}").main
        if body(["--workspace", str(root), "--round", "1"]):
            raise SystemExit(f"{name} failed")
        taken["cpu_s"] = time.process_time()
    taken["wall_s"] = time.perf_counter() - began
    taken["peak_mb"] = _peak_mb()
    print(json.dumps(taken))


def _peak_mb() -> float:
    """Of this program; `ru_maxrss` is at least what its parent had when it started it (getrusage(2), execve(2))."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def run_side(root: Path, name: str, bare_shards: int) -> dict[str, float]:
    """`side` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.solver_data", "--side", name, "--keep", str(root)]
    command += ["--bare-shards", str(bare_shards)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=source_root(), env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stdout[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(root: Path, attempts: int, bare_shards: int) -> dict[str, dict[str, float]]:
    """What each side took; rates in attempts per second of CPU time."""
    before = run_side(root, "bare", bare_shards)
    jobs = {}
    for name in JOBS:
        jobs[name] = run_side(root, name, bare_shards)
        jobs[name]["rate"] = attempts / jobs[name]["cpu_s"]
        if name == "grade":
            enhance(root)
    after = run_side(root, "bare", bare_shards)  # a machine may become slower while this runs
    bare = {name: before[name] + after[name] for name in before}
    bare |= {"rate": bare["attempts"] / bare["cpu_s"], "peak_mb": max(before["peak_mb"], after["peak_mb"])}
    taken = {"bare": bare, **jobs}
    cpu_s = sum(taken[name]["cpu_s"] for name in JOBS)
    taken["together"] = {
        "cpu_s": cpu_s, "wall_s": sum(taken[name]["wall_s"] for name in JOBS), "rate": attempts / cpu_s,
        "peak_mb": max(taken[name]["peak_mb"] for name in JOBS), "ratio": attempts / cpu_s / taken["bare"]["rate"],
    }  # fmt: skip
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of answers (default: %(default)s)")
    parser.add_argument("--bare-shards", type=int, default=8, help="on how many the bare checker is timed")
    parser.add_argument("--quick", action="store_true", help="2000 questions in 4 shards")
    parser.add_argument("--keep", type=Path, help="the workspace; by default a temporary one")
    parser.add_argument("--side", choices=("bare", *JOBS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        side(options.keep, options.side, options.bare_shards)
        return 0
    if options.quick:
        options.questions, options.shards, options.bare_shards = 2000, 4, 4
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder) / "run"
        make(root, options.questions, options.attempts, options.shards, options.tokens, options.kinds.split(","))
        taken = measure(root, options.questions * options.attempts, min(options.bare_shards, options.shards))
    print(f"{options.questions} questions × {options.attempts} attempts, {options.shards} shards, {options.kinds}")
    print(f"{'':10}{'attempts/s':>12}{'CPU s':>9}{'wall s':>9}{'peak MB':>9}")
    for name, one in taken.items():
        print(f"{name:10}{one['rate']:12.0f}{one['cpu_s']:9.1f}{one['wall_s']:9.1f}{one['peak_mb']:9.0f}")
    print(f"ratio to the bare checker: {taken['together']['ratio']:.2f}")
    return int(taken["together"]["peak_mb"] > MOST_MB or taken["together"]["ratio"] < LEAST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
