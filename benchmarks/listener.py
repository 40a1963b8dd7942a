"""What the listener's service costs: its throughput beside that of the bare engine and of the naive form.

    python -m benchmarks.listener [--engine transformers|vllm] [--repeat 5] [--size 56] [--threads 1]

The tiny listener (models/tiny-lewis) answers 600 (image, question) pairs: 200 games of three rendered scenes each, so
that there are 8 questions about each of 75 images. All times begin with image files and end with P(yes) as floats.

    bare engine   one process: reads the 75 images, encodes them together, once, and answers the 600 pairs in one call
                  of the engine (transformers: one forward pass; vllm: one `generate`). No service code takes part.
    service       `python -m jobs.serve --service listener` in a process of its own, its config as shipped, asked over
                  HTTP by the client that jobs use, in another process.
    naive         one pair at a time through transformers' `generate`, image and all, at most 10 new tokens; it may stop
                  at its end token, which favours it. A sample of the pairs.

The three take turns, --repeat times, and medians are compared. Each turn has images and questions that no process has
seen, so neither the answer cache nor an image cache of earlier turns takes part. Then come 1, 8, 32 and 128 clients,
each of which sends one game at a time, again all new.

Every answer of the service is compared with the bare engine's. All processes have the same number of threads, and on a
machine of few cores the client competes with the server. Ends with status 1 when an answer was wrong or lost, or when a
target was missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.listener_sides import (
    REPOSITORY,
    Ask,
    Games,
    K,
    bare,
    config_of,
    naive,
    new_run,
    pairs_of,
    process,
    service,
)
from hpc_rl.grading.lewis import decide
from hpc_rl.orchestrate.job import Job
from hpc_rl.services.client import ListenerClient, ScoreResult

PAIRS = 600
NAIVE_PAIRS = 60
CLIENTS = (1, 8, 32, 128)
LOAD_GAMES = 512
TOLERANCE = 1e-4
OF_BARE, OF_NAIVE = 0.85, 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all answers are right and both targets are met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.listener", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--repeat", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--size", type=int, default=56, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a process (default: %(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        job = new_run(Path(folder) / "run", options.engine)
        games = Games(job, options.size)
        with process(bare, job) as ask_bare, process(naive, job) as ask_naive, service(job):
            turns = compare(job, games, ask_bare, ask_naive, options.repeat)
            loads = [under_load(job, games, ask_bare, clients) for clients in CLIENTS]
    return report(options, turns, loads)


@dataclass
class Sides:
    """Pairs per second of each side, one number a turn, and what was wrong with the service's answers."""

    bare: list[float] = field(default_factory=list)
    service: list[float] = field(default_factory=list)
    naive: list[float] = field(default_factory=list)
    bad: Bad = field(default_factory=lambda: Bad())


@dataclass
class Bad:
    """Answers of the service that are not the bare engine's, and games without an answer."""

    wrong: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Load:
    """What a number of clients saw. Seconds of each game, pairs per second of all clients."""

    clients: int
    seconds: list[float]
    pairs_per_s: float
    bad: Bad


def compare(job: Job, games: Games, ask_bare: Ask, ask_naive: Ask, repeat: int) -> Sides:
    """All sides, in turns, after one turn that does not count."""
    sides = Sides()
    for turn in range(repeat + 1):
        asked = games.new(PAIRS // K)
        pairs = pairs_of(asked)
        bare_s, expected = ask_bare(pairs)
        with ListenerClient(job.ws, config_of(job)) as client:
            client.score(games.new(1))  # it has found the server, and has a connection
            began = time.perf_counter()
            said = client.score(asked)
            service_s = time.perf_counter() - began
        naive_s, _ = ask_naive(pairs[:: len(pairs) // NAIVE_PAIRS])
        check(said, expected, sides.bad)
        if turn:
            sides.bare.append(len(pairs) / bare_s)
            sides.service.append(len(pairs) / service_s)
            sides.naive.append(NAIVE_PAIRS / naive_s)
            print(
                f"turn {turn}: bare engine {sides.bare[-1]:6.0f}   service {sides.service[-1]:6.0f}   "
                f"naive {sides.naive[-1]:6.0f} pairs/s",
                flush=True,
            )
    return sides


def under_load(job: Job, games: Games, ask_bare: Ask, clients: int) -> Load:
    """Many clients, each of which asks one game after the other."""
    asked = games.new(LOAD_GAMES)
    _, expected = ask_bare(pairs_of(asked))
    ready = threading.Barrier(clients + 1, timeout=120)
    warm = games.new(clients)

    def one_client(number: int) -> list[tuple[int, float, Any]]:
        answers = []
        with ListenerClient(job.ws, config_of(job)) as client:
            client.score([warm[number]])
            ready.wait()
            for place in range(number, LOAD_GAMES, clients):
                began = time.perf_counter()
                said = client.score([asked[place]])
                answers.append((place, time.perf_counter() - began, said[0]))
        return answers

    with ThreadPoolExecutor(clients) as threads:
        answering = [threads.submit(one_client, number) for number in range(clients)]
        ready.wait()
        began = time.perf_counter()
        answers = sorted(answer for each in answering for answer in each.result())
        took_s = time.perf_counter() - began
    bad = Bad()
    check([said for _, _, said in answers], expected, bad)
    return Load(clients, [seconds for _, seconds, _ in answers], len(expected) / took_s, bad)


def check(said: Sequence[Any], expected: Sequence[float], bad: Bad) -> None:
    """Count answers that are not the bare engine's."""
    rest = iter(expected)
    for answer in said:
        right = list(islice(rest, K))
        if not isinstance(answer, ScoreResult):
            print(f"lost: {answer}", file=sys.stderr)
            bad.lost += 1
            continue
        off = max(abs(p - q) for p, q in zip(answer.yes_probabilities, right, strict=True))
        bad.wrong += not off <= TOLERANCE or answer.predicted_index != decide(answer.yes_probabilities)
    assert next(rest, None) is None


def report(options: argparse.Namespace, sides: Sides, loads: Sequence[Load]) -> int:
    """Print the tables and the verdict; the exit status."""
    print(f"\n{PAIRS} pairs of {options.size} × {options.size} pixels, engine {options.engine}, {options.threads} "
          f"thread(s) a process, {os.cpu_count()} cores; pairs/s:")  # fmt: skip
    for name, rates in (("bare engine", sides.bare), ("service", sides.service), ("naive", sides.naive)):
        print(f"  {name:<12} median {statistics.median(rates):6.0f}   from {min(rates):6.0f} to {max(rates):6.0f}")
    print(f"\n{LOAD_GAMES} games of {K} images, one in each request:")
    print("  clients   pairs/s   p50 ms   p99 ms   wrong   lost")
    for load_ in loads:
        cuts = statistics.quantiles(load_.seconds, n=100)
        print(
            f"  {load_.clients:7}   {load_.pairs_per_s:7.0f}   {cuts[49] * 1e3:6.1f}   {cuts[98] * 1e3:6.1f}   "
            f"{load_.bad.wrong:5}   {load_.bad.lost:4}"
        )
    bare, service, naive = (statistics.median(rates) for rates in (sides.bare, sides.service, sides.naive))
    wrong = sides.bad.wrong + sum(one.bad.wrong for one in loads)
    lost = sides.bad.lost + sum(one.bad.lost for one in loads)
    of_bare, of_naive = service / bare, service / naive
    print(
        f"\nservice / bare engine = {of_bare:.2f} (target {OF_BARE:g}: {_verdict(of_bare >= OF_BARE)}), "
        f"service / naive = {of_naive:.1f} (target {OF_NAIVE:g}: {_verdict(of_naive >= OF_NAIVE)}), "
        f"wrong answers {wrong}, lost {lost}"
    )
    return int(bool(wrong or lost or of_bare < OF_BARE or of_naive < OF_NAIVE))


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
