"""The sides of `benchmarks.million`: each is what one job or command does, in a process of its own, as it is measured.

    python -m benchmarks.million_sides SIDE WORKSPACE …

prints one line of JSON for each workspace: seconds, the process's peak memory, and what it took before that round's
data was touched. Several, in one process, have their libraries in common: what differs is what grows with the round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

ROUND = 1
PROMPT_TOKENS = 100
WEIGHTS = "0" * 64


class Drawing:
    """An engine without a model: sampled tokens, log-probabilities and text are drawn at random, from the seed alone.

    In all else it is used as a real one: requests are submitted, some of them finish in each step, in any order.
    """

    capacity = 256

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._waiting: dict[str, Any] = {}
        self._words = [f"word{number}" for number in range(2000)]

    @property
    def unfinished(self) -> int:
        return len(self._waiting)

    def expect(self, prompts: Sequence[Any]) -> int:
        return len(prompts)

    def submit(self, key: str, request: Any, sampling: Any) -> None:
        self._waiting[key] = request

    def step(self) -> list[tuple[str, Any]]:
        running = list(itertools.islice(self._waiting, self.capacity))
        return [(key, self._answer(self._waiting.pop(key))) for key in running[::2] or running]

    def _answer(self, request: Any) -> Any:
        from hpc_rl.engines.base import Completion

        rng = random.Random(request.seed)
        length = rng.randint(self._tokens // 2, 3 * self._tokens // 2)
        tokens = tuple(rng.randrange(150_000) for _ in range(length))
        said = " ".join(rng.choices(self._words, k=length // 2))
        return Completion(
            prompt_token_ids=tuple(range(PROMPT_TOKENS)),
            token_ids=tokens,
            logprobs=tuple(-rng.random() * 3 for _ in range(length)),
            text=f"<general>{said}</general> <detailed>{said}.</detailed>",
            finish_reason="stop",
        )

    def abort(self, keys: Collection[str]) -> None:
        for key in keys:
            del self._waiting[key]

    def close(self) -> None:
        self._waiting.clear()


class Picking:
    """A listener without a model, in this process."""

    def score(self, asked: Sequence[Any]) -> list[Any]:
        from hpc_rl.services.client import ScoreResult

        rng = random.Random(len(asked))
        chances = [tuple(rng.random() for _ in one.candidates) for one in asked]
        return [ScoreResult(chance, chance.index(max(chance))) for chance in chances]


def sample(root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """The sampling task: prompts, claims, the stream, publishing; with an engine that draws at random.

    vLLM's libraries are loaded where they are installed, so that they are part of the process, as in a real task.
    """
    from hpc_rl.cluster.walltime import Deadline
    from hpc_rl.orchestrate.job import load
    from hpc_rl.sampling.at_work import Origin
    from hpc_rl.sampling.checked import check_source
    from hpc_rl.sampling.lewis import source as source_of
    from hpc_rl.sampling.record import Recorder
    from hpc_rl.sampling.stream import Stream

    job = load(root, ROUND, "sample")
    job.folder.mkdir(parents=True, exist_ok=True)
    config: Any = job.config
    libraries = _load_engine_libraries()
    ready()
    source = check_source(source_of(job), job.stage.shards, config.speaker.path, config.speaker, config.sample)
    with job.claims() as claims, Recorder(job.folder, claims.token) as task:
        origin = Origin(config.run.seed, ROUND, WEIGHTS, task.name)
        stream = Stream(
            claims, lambda: Drawing(config.sample.max_tokens), source, origin, task,
            deadline=Deadline(), linger_s=1.0, speculate=False,
        )  # fmt: skip
        ending = stream.run()
        return {"ending": ending.value, "samples": task.record().samples, "libraries": libraries}


def _load_engine_libraries() -> str:
    from hpc_rl.engines.vllm_start import VllmMissing, import_vllm

    try:
        import_vllm()
    except VllmMissing:
        return "without those of vLLM, which is not installed"
    from vllm import LLM  # noqa: F401  (the package loads what it needs when it is asked for)

    return "those of vLLM among them"


def grade(root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """The grading job, all but the calls of the listener: another process's answers are drawn at random here."""
    from hpc_rl.data.lewis import read_rows
    from hpc_rl.orchestrate.job import load
    from jobs.lewis import grade as body

    job = load(root, ROUND, "grade")
    job.folder.mkdir(parents=True, exist_ok=True)
    config: Any = job.config
    ready()
    rows = read_rows(job.input(0, "dataset", 0).path("train.parquet"))
    places = {id: place for place, id in enumerate(rows.ids)}
    for shard in job.shards():
        path = job.input(ROUND, "sample", shard.index).path("samples.parquet")
        body.grade(job, config, shard, path, lambda id: rows[places[id]], Picking())
    return {}


def train(root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """All that the training job reads: games, samples, the plan, and each batch of one epoch; no model."""
    from hpc_rl.data.lewis import read_rows
    from hpc_rl.orchestrate.job import load
    from hpc_rl.training.algorithms import grpo  # noqa: F401  (its libraries are part of the process)
    from hpc_rl.training.data import plan, store

    job = load(root, ROUND, "train")
    config: Any = job.config
    ready()
    rows = read_rows(job.input(0, "dataset", 0).path("train.parquet"))
    places = {id: place for place, id in enumerate(rows.ids)}
    began = time.monotonic()
    sizes = config.sample.samples_per_prompt, config.sample.prompts_per_round
    graded = (manifest.path("graded.parquet") for manifest in job.inputs(ROUND, "grade"))
    rollouts = store.read(graded, ("accuracy", "format", "length"), *sizes)
    reading_s = time.monotonic() - began
    shape = plan.Shape(ranks=8, accumulation=4, batch=8)
    made = plan.make(rollouts, shape, epochs=1, run_seed=0, round=ROUND)
    made.fingerprint()
    planned_s = time.monotonic() - began - reading_s
    tokens = 0
    for step in made:
        for number in range(shape.accumulation):
            for item in step.batch(0, number):
                tokens += len(item.unit.token_ids)
                assert rows[places[item.unit.row_id]].id == item.unit.row_id
    return {
        "samples": len(rollouts), "steps": len(made), "tokens": tokens, "reading_s": round(reading_s, 1),
        "planning_s": round(planned_s, 1), "batches_s": round(time.monotonic() - began - reading_s - planned_s, 1),
    }  # fmt: skip


def report(root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """`python -m hpc_rl.report`."""
    from hpc_rl import report as command

    return _command(command.main, root, ready)


def status(root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    """`python -m hpc_rl.status`."""
    from hpc_rl import status as command

    return _command(command.main, root, ready)


def _command(main: Callable[[Sequence[str]], int], root: Path, ready: Callable[[], None]) -> dict[str, Any]:
    ready()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([str(root)]) == 0
    return {"said": said.getvalue()}


SIDES = {"sample": sample, "grade": grade, "train": train, "report": report, "status": status}


def memory_mb(what: str) -> float:
    """`VmHWM`, the peak of this process's memory, or `VmRSS`, what it has now (proc(5)).

    Not getrusage's `ru_maxrss`: that starts with the memory of the process that started this one (getrusage(2)).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def measured(side: str, root: Path) -> dict[str, Any]:
    """One side of one round."""
    before_mb = 0.0

    def ready() -> None:
        nonlocal before_mb
        before_mb = memory_mb("VmRSS")

    began = time.monotonic()
    found = SIDES[side](root, ready)
    took = {"seconds": round(time.monotonic() - began, 1), "before_mb": before_mb, "peak_mb": memory_mb("VmHWM")}
    return {**took, **found}


def main() -> int:
    """Run one side."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million_sides")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("workspaces", type=Path, nargs="+")
    arguments = parser.parse_args()
    for root in arguments.workspaces:
        print(json.dumps(measured(arguments.side, root)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
