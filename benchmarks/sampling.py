"""What the sampling job loses against the bare engine: the same requests through both, in turns.

    python -m benchmarks.sampling [--cases images text] [--repeat 5] [--threads 1] [--quick]

    bare   one call of `vllm.LLM.generate` over all requests, texts in and texts out (benchmarks/sampling_sides.py).
           Its clock starts when prompts have gone through the chat template and pictures are decoded.
    job    `python -m jobs.sample` in a workspace made by `hpc_rl.launch --init`, as users run it: 64 shards are
           claimed, read, sampled, judged, written and published. Its clock starts at its first request.

Both are processes of their own with the same environment, engine arguments and sampling parameters; for pictures bare
has vLLM's cache of processed ones, the job its own. Start-up is that of a first round, without a compile cache. The
sides go in turns, bare first in one and the job in the next. `images`: the tiny
Lewis speaker describes rendered scenes; `text`: a tiny chat model with random weights answers sums. `short` has many
completions of a few tokens, `long` few of many: what a request costs counts most in the one, what a token costs and how
the batch runs empty in the other.

Prints tokens per second of both sides, turn by turn, their medians and ratio; the same with start-up counted, from the
first line of the process to its end; and how many samples have other token ids. Ends with status 1 when `images` or
`text` is below the target.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sums_recipe import SumsConfig
from hpc_rl import recipes
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.grading.samples import iter_samples
from hpc_rl.orchestrate.job import Job, load
from hpc_rl.run import manifest
from hpc_rl.sampling.record import read_records
from hpc_rl.sampling.source import Source
from hpc_rl.sampling.tasks import TaskQueue
from hpc_rl.training.task import find

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = 0.95
SHARDS = 64


@dataclass(frozen=True)
class Case:
    """What is sampled: `prompts` × `samples` completions of at most `max_tokens` tokens."""

    name: str
    config: str
    prompts: int
    samples: int
    max_tokens: int
    counts: bool = True
    """The target is for this one."""

    def settings(self, model: Path) -> list[str]:
        """Overrides of its config."""
        own = [f"data.train_rows={self.prompts}"] if self.config == IMAGES else [f"speaker.path={model}"]
        sizes = {
            "prompts_per_round": self.prompts,
            "samples_per_prompt": self.samples,
            "shard_size": max(1, self.prompts // SHARDS),
            "max_tokens": self.max_tokens,
        }
        return own + [f"sample.{name}={value}" for name, value in sizes.items()]


IMAGES, TEXT = "configs/tiny/lewis.yaml", "benchmarks/sums.yaml"
CASES = {
    case.name: case
    for case in (
        Case("images", IMAGES, prompts=1024, samples=4, max_tokens=48),
        Case("text", TEXT, prompts=1024, samples=4, max_tokens=48),
        Case("short", *TEXT, prompts=2048, samples=4, max_tokens=8, counts=False),
        Case("long", *TEXT, prompts=128, samples=4, max_tokens=384, counts=False),
    )
}


@dataclass(frozen=True)
class Turn:
    """One side, once.

    Attributes
    ----------
    tokens
        Sampled.
    sampling_s
        Start-up aside.
    process_s
        From the start of the process to its end.
    parts
        What the time went into, in seconds.
    token_ids
        By sample id.
    """

    tokens: int
    sampling_s: float
    process_s: float
    parts: Mapping[str, float]
    token_ids: Mapping[str, Sequence[int]]

    @property
    def speed(self) -> float:
        """Tokens per second, start-up aside."""
        return self.tokens / self.sampling_s

    @property
    def speed_with_start_up(self) -> float:
        """Tokens per second of the whole process."""
        return self.tokens / self.process_s


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the targets are met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["images", "text"])
    parser.add_argument("--repeat", type=int, default=5, help="turns that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a process (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the prompts, one turn: a look, no result")
    options = parser.parse_args(argv)
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    missed = [name for name in options.cases if not _measure(CASES[name], options)]
    print(f"below {TARGET}: {', '.join(missed)}" if missed else f"all that have the target {TARGET} meet it")
    return 1 if missed else 0


def _measure(case: Case, options: argparse.Namespace) -> bool:
    """Both sides of a case, in turns; whether it meets its target."""
    if options.quick:
        case = replace(case, prompts=case.prompts // 4)
    with tempfile.TemporaryDirectory(prefix="hpc_rl-bench-") as name:
        folder = Path(name)
        prepared = _prepare(case, folder)
        requests = folder / "requests.jsonl"
        lines = list(_requests(prepared))
        requests.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        print(
            f"\n{case.name}: {case.prompts} prompts × {case.samples} samples in {prepared.stage.shards} shards, "
            f"at most {case.max_tokens} tokens; threads of a process: {options.threads}",
            flush=True,
        )
        bare, job = [], []
        repeat = 1 if options.quick else options.repeat
        for turn in range(repeat + (not options.quick)):
            sides = [partial(_job, case, prepared, folder / f"turn-{turn}"), partial(_bare, prepared, requests, lines)]
            done = [side() for side in (sides if turn % 2 else sides[::-1])]
            job_now, bare_now = done if turn % 2 else done[::-1]
            counts = turn > 0 or options.quick  # the first fills the page cache
            if counts:
                bare.append(bare_now)
                job.append(job_now)
            ratio = job_now.speed / bare_now.speed
            note = "" if counts else "   (does not count)"
            print(f"  bare {bare_now.speed:6.0f}   job {job_now.speed:6.0f} tokens/s   {ratio:.3f}{note}", flush=True)
    return _report(case, bare, job)


def _prepare(case: Case, folder: Path) -> Job:
    """A workspace of the case, up to the round's sampling."""
    from tools.tiny_chat_model import write

    model, root = folder / "model", folder / "run"
    if case.config == TEXT:
        write(model)
    settings = [word for setting in case.settings(model) for word in ("--set", setting)]
    _run(["hpc_rl.launch", case.config, "--workspace", str(root), "--init", *settings])
    for module in ("jobs.lewis.prepare", "jobs.lewis.dataset") if case.config == IMAGES else ():
        _run([module, "--workspace", str(root), "--round", "0"])
    return load(root, 1, "sample")


def _requests(job: Job) -> Iterator[dict[str, Any]]:
    """What the job asks, as the bare side takes it."""
    source = _source(job)
    for shard in range(job.stage.shards):
        for attempt in TaskQueue(source.tasks(shard), source.rules).start():
            yield {
                "id": attempt.id,
                "messages": list(attempt.task.prompt.messages),
                "images": [str(image) for image in attempt.task.prompt.images],
                "seed": attempt.seed(job.config.run.seed, job.round),
            }


def _source(job: Job) -> Source:
    made: Source = find(recipes.load(job.config.recipe).sampling(job.config, job.stage.id).source)(job)
    return made


def _bare(job: Job, requests: Path, lines: Sequence[Mapping[str, Any]]) -> Turn:
    assert isinstance(job.config, SumsConfig | LewisConfig)
    speaker, sample, ids = job.config.speaker, job.config.sample, requests.with_name("token_ids.jsonl")
    given = {
        "max-tokens": sample.max_tokens,
        "temperature": sample.temperature,
        "dtype": speaker.dtype,
        "max-model-len": sample.max_model_len,
        "max-num-seqs": sample.max_num_seqs,
        "min-pixels": speaker.min_pixels,
        "max-pixels": speaker.max_pixels,
        "gpu-memory-utilization": sample.gpu_memory_utilization,
        "cpu-kv-cache-gib": sample.cpu_kv_cache_gib,
        "token-ids": ids,
    }
    said, process_s = _timed(
        ["benchmarks.sampling_sides", str(speaker.path), str(requests)]
        + [f"--{name}={value}" for name, value in given.items() if value is not None]
    )
    found = json.loads(said.splitlines()[-1])
    token_ids = [json.loads(line) for line in ids.read_text().splitlines()]
    return Turn(
        tokens=found["tokens"],
        sampling_s=found["generating_s"],
        process_s=process_s,
        parts={name: found[f"{name}_s"] for name in ("importing", "starting", "preparing", "generating")},
        token_ids={line["id"]: sampled for line, sampled in zip(lines, token_ids, strict=True)},
    )


def _job(case: Case, prepared: Job, root: Path) -> Turn:
    shutil.copytree(prepared.ws.root, root, symlinks=True)
    _, process_s = _timed(["jobs.sample", "--workspace", str(root), "--round", "1"])
    job = load(root, 1, "sample")
    paths = [manifest.read(job.ws, 1, "sample", shard).path("samples.parquet") for shard in range(job.stage.shards)]
    token_ids = {sample.sample_id: sample.token_ids for path in paths for sample in iter_samples(path)}
    (record,) = read_records(job.folder)
    shutil.rmtree(root)
    before = record.seconds["start_up"]
    return Turn(
        tokens=sum(map(len, token_ids.values())),
        sampling_s=sum(record.seconds.values()) - before,
        process_s=process_s,
        parts={**record.loading, **record.seconds},
        token_ids=token_ids,
    )


def _report(case: Case, bare: Sequence[Turn], job: Sequence[Turn]) -> bool:
    """Print the medians; whether the target is met."""
    speeds = [statistics.median(turn.speed for turn in side) for side in (bare, job)]
    whole = [statistics.median(turn.speed_with_start_up for turn in side) for side in (bare, job)]
    seconds = [statistics.median(turn.process_s for turn in side) for side in (bare, job)]
    ratio = speeds[1] / speeds[0]
    wanted = f" (wanted: at least {TARGET})" if case.counts else ""
    print(f"median of {len(bare)}: bare {speeds[0]:.0f}, job {speeds[1]:.0f} tokens/s, ratio {ratio:.3f}{wanted}")
    print(
        f"with start-up: bare {whole[0]:.0f} tokens/s ({seconds[0]:.1f} s), job {whole[1]:.0f} tokens/s "
        f"({seconds[1]:.1f} s), ratio {whole[1] / whole[0]:.3f}"
    )
    for name, side in (("bare", bare), ("job", job)):
        parts = {part: statistics.median(turn.parts.get(part, 0.0) for turn in side) for part in side[0].parts}
        print(f"seconds, {name}: " + ", ".join(f"{part} {s:.1f}" for part, s in parts.items()))
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(bare, job, strict=True)]
    assert all(one.keys() == other.keys() for one, other in pairs), "a sample is missing"
    drawn = sum(len(one) for one, _ in pairs)
    differ = sum(list(ids) != list(other[sample]) for one, other in pairs for sample, ids in one.items())
    print(f"{differ} of {drawn} samples have other token ids ({differ / drawn:.2%})", flush=True)
    return ratio >= TARGET or not case.counts


def _timed(command: Sequence[str]) -> tuple[str, float]:
    began = time.monotonic()
    said = _run(command)
    return said, time.monotonic() - began


def _run(command: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
