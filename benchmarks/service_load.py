"""Whether a service survives: many clients ask for minutes while its replicas are killed and started again, in turn.

    python -m benchmarks.service_load [--minutes 10] [--clients 64] [--replicas 2] [--kill-every 30] [--rate 1]

The replicas are `jobs.serve --service listener` with the tiny listener (models/tiny-lewis), in processes of their own.
They are killed with SIGKILL, so that nothing is said to anybody and their handoff records stay behind. Each client is a
`ServiceClient` of its own, which sends a few random games (three rendered scenes and a question each), `--rate` times a
second on average.

What the bare engine says about all pairs of images and questions is computed beforehand. Each request is then

    right      the answer is the bare engine's, up to rounding: other requests share its batch (1e-5)
    wrong      it is not
    lost       the client gave up

and `retried` counts tries after which the client asked again: the server was gone, refused with a reason (busy:
429, 503), or failed. Ends with status 1 when a request was wrong or lost, or when a replica ended by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data import scenes
from hpc_rl.grading.lewis import Description, decide, question
from hpc_rl.orchestrate.job import Job, load
from hpc_rl.services import handoff
from hpc_rl.services.calling import CallFailed, ServiceClient, ServiceRefused, ServiceUnavailable
from jobs import serve

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "configs/tiny/lewis.yaml"
SETTINGS = (
    "services.listener.host=127.0.0.1",
    "services.listener.client.deadline_s=120",
    "services.listener.client.timeout_s=30",
    "services.listener.idle_timeout_s=300",
)
IMPORTED = (
    "hpc_rl.engines.yes_no",
    "hpc_rl.services.hosting",
    "hpc_rl.services.listener",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
)
K, MOST_GAMES, IMAGES = 3, 4, 48
TOLERANCE = 1e-5
PROGRESS_S = 10.0
START_PATIENCE_S = 120.0

Expected = dict[tuple[str, str], float]
"""The bare engine's P(yes), by image path and question."""
Game = dict[str, Any]
"""As `/batch_score` takes it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every request was answered right, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service_load", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=10, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--kill-every", type=float, default=30, help="seconds between kills (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1, help="requests a client sends in a second (default: 1)")
    options = parser.parse_args(argv)
    os.environ |= {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpc_rl-load-") as folder:
        job = _new_run(Path(folder) / "run")
        with _replicas(job, options.replicas) as replicas:
            expected = _bare(job)
            _wait_for(job, options.replicas)
            tally = Tally()
            print(f"{options.clients} clients, {options.replicas} replicas, {len(expected)} pairs", flush=True)
            with _clients(job, options.clients, options.rate, expected, tally):
                _disturb(replicas, options.minutes * 60, options.kill_every, tally)
    return report(tally)


@dataclass
class Tally:
    """What happened so far; for many threads."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0
    kills: int = 0
    deaths: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, took_s: float, right: bool) -> None:
        """Count one answer."""
        with self.lock:
            self.seconds.append(took_s)
            self.wrong += not right

    def gave_up(self, reason: str) -> None:
        """Count one request without an answer."""
        print(f"lost: {reason}", file=sys.stderr, flush=True)
        with self.lock:
            self.lost += 1

    def __str__(self) -> str:
        with self.lock:
            asked, retried = len(self.seconds) + self.lost, sum(self.troubles.values())
            cuts = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [0.0] * 99
        why = ", ".join(f"{kind} {count}" for kind, count in sorted(self.troubles.items()))
        return (
            f"requests {asked}, wrong {self.wrong}, lost {self.lost}, retried {retried} [{why}], "
            f"p50 {cuts[49] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms, kills {self.kills}, "
            f"ended by themselves {self.deaths}"
        )


def report(tally: Tally) -> int:
    """Print the verdict; the exit status."""
    good = bool(tally.seconds) and not (tally.wrong or tally.lost or tally.deaths)
    print(f"{tally}: {'OK' if good else 'FAILED'}")
    return int(not good)


def is_right(games: Sequence[Game], said: Any, expected: Expected) -> bool:
    """Whether the answer to a request is the bare engine's."""
    results = said["results"]
    if len(results) != len(games):
        return False
    for game, result in zip(games, results, strict=True):
        right = [expected[path, game["question"]] for path in game["candidate_paths"]]
        given = result.get("yes_probabilities", [])
        if len(given) != len(right) or not all(abs(p - q) <= TOLERANCE for p, q in zip(given, right, strict=True)):
            return False
        if result["predicted_index"] != decide(given):
            return False
    return True


class Replica:
    """A server in a process of its own, which can be killed and started again as the same replica of the service."""

    def __init__(self, job: Job, number: int) -> None:
        self._job, self._number, self._starts = job, number, 0
        self.log = job.ws.root / f"serve-{number}.log"
        self.start()

    def start(self) -> None:
        """Start it; returns at once. It is forked from a process that has imported all it needs, and does no more."""
        context = get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        environment = {"HPC_RL_JOB_ID": f"{self._number}", "HPC_RL_RESTART": f"{self._starts}"}
        self._starts += 1
        self.process = context.Process(target=_serve, args=(self._job.ws.root, environment, self.log))
        self.process.start()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()
        self.process.join()


def _serve(workspace: Path, environment: Mapping[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(serve.main(["--workspace", str(workspace), "--round", "0", "--service", "listener"]))


@contextmanager
def _replicas(job: Job, count: int) -> Iterator[list[Replica]]:
    replicas = [Replica(job, number) for number in range(count)]
    try:
        yield replicas
    finally:
        for replica in replicas:
            replica.kill()


def _disturb(replicas: Sequence[Replica], duration_s: float, kill_every_s: float, tally: Tally) -> None:
    """Kill and start the replicas in turn, and say how it goes, until the time is over."""
    began = time.monotonic()
    next_kill, next_word = began + kill_every_s, began + PROGRESS_S
    while (now := time.monotonic()) < began + duration_s:
        for replica in replicas:
            if not replica.process.is_alive():
                tally.deaths += 1
                print(f"a replica ended by itself:\n{replica.log.read_text()[-3000:]}", file=sys.stderr, flush=True)
                replica.start()
        if now >= next_kill:
            victim = replicas[tally.kills % len(replicas)]
            victim.kill()
            victim.start()
            tally.kills += 1
            next_kill += kill_every_s
        if now >= next_word:
            print(f"{now - began:6.0f} s: {tally}", flush=True)
            next_word += PROGRESS_S
        time.sleep(0.1)


@contextmanager
def _clients(job: Job, count: int, rate: float, expected: Expected, tally: Tally) -> Iterator[None]:
    """Clients that ask until the context ends, and answer for what they asked last."""
    over = threading.Event()
    threads = [
        threading.Thread(target=_ask, args=(job, number, rate, expected, tally, over)) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _ask(job: Job, number: int, rate: float, expected: Expected, tally: Tally, over: threading.Event) -> None:
    rng = random.Random(number)
    paths, questions = (sorted(set(names)) for names in zip(*expected, strict=True))
    options = job.config.services.listener.client
    with ServiceClient(job.ws.service_dir("listener"), options, rng=random.Random(number)) as client:
        while not over.wait(rng.expovariate(rate)):
            games = [
                {"candidate_paths": rng.sample(paths, K), "question": rng.choice(questions)}
                for _ in range(rng.randint(1, MOST_GAMES))
            ]
            before, began = client.troubles.copy(), time.perf_counter()
            try:
                said = client.post("/batch_score", {"batch": games})
            except (ServiceUnavailable, ServiceRefused, CallFailed) as error:
                tally.gave_up(str(error))
            else:
                tally.answered(time.perf_counter() - began, is_right(games, said, expected))
            with tally.lock:
                tally.troubles.update(client.troubles - before)


def _new_run(folder: Path) -> Job:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "hpc_rl.launch", CONFIG, "--workspace", str(folder), "--init", *settings]
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return load(folder, 0, "evaluate")


def _bare(job: Job) -> Expected:
    """P(yes) of every image and question, by the model alone, one image at a time."""
    from hpc_rl.data.images import load_image
    from hpc_rl.services.listener import open_judge

    names = [(category, concept) for category in scenes.categories() for concept in scenes.concepts()]
    config = job.config
    assert isinstance(config, LewisConfig)
    judge = open_judge(config.listener, config.services.listener)
    questions = [question(config.listener.question, Description(*scenes.caption(*name))) for name in names]
    expected: Expected = {}
    job.ws.images_dir.mkdir(parents=True, exist_ok=True)
    for category, concept in names[:: len(names) // IMAGES][:IMAGES]:
        path = f"{category}-{concept}.png"
        scenes.render(0, "train", category, concept, 0).save(job.ws.images_dir / path)
        (image,) = judge.encode([judge.prepare(load_image(job.ws.images_dir / path))])
        answers = judge.yes_probabilities([(image, asked) for asked in questions])
        expected |= {(path, asked): p for asked, p in zip(questions, answers, strict=True) if isinstance(p, float)}
    assert len(expected) == IMAGES * len(questions), "the model gave no score for a pair"
    return expected


def _wait_for(job: Job, count: int) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while len(handoff.discover(job.ws.service_dir("listener"))) < count:
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in job.ws.root.glob("serve-*.log"))
            raise SystemExit(f"the replicas did not start within {START_PATIENCE_S:g} s:\n{logs}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
