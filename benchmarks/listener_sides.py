"""The sides that benchmarks/listener.py compares, each in a process of its own, and the games that they get."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data import scenes
from hpc_rl.grading.lewis import Description, question
from hpc_rl.orchestrate.job import Job, load
from hpc_rl.services.client import ScoreRequest

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "configs/tiny/lewis.yaml"
K = 3
"""Images of a game."""
QUESTIONS = 8
"""Questions about each image."""
NAIVE_TOKENS = 10
PATIENCE_S = 120

Pairs = list[tuple[str, str]]
"""(image path, question)."""
Answerer = Callable[[Pairs], list[float]]
"""P(yes) of pairs."""
Ask = Callable[[Pairs], tuple[float, list[float]]]
"""Seconds that another process took for pairs, and its P(yes)."""


class Games:
    """Games that nobody has seen: each call renders new images.

    Parameters
    ----------
    job
        The run, in whose image folder they are.
    size
        Side of an image in pixels.
    """

    def __init__(self, job: Job, size: int) -> None:
        self._job, self._size = job, size
        self._views = 0

    def new(self, count: int) -> list[ScoreRequest]:
        """`count` games; `QUESTIONS` of them in a row are about the same K images."""
        made: list[ScoreRequest] = []
        while len(made) < count:
            self._views += 1
            concepts = scenes.concepts()
            category = scenes.categories()[self._views % len(scenes.categories())]
            chosen = [concepts[(self._views + step) % len(concepts)] for step in range(QUESTIONS)]
            paths = tuple(self._render(category, concept) for concept in chosen[:K])
            told = (Description(*scenes.caption(category, concept)) for concept in chosen)
            made += [ScoreRequest(question(config_of(self._job).listener.question, one), paths) for one in told]
        return made[:count]

    def _render(self, category: str, concept: str) -> str:
        path = Path("train") / category / concept / f"view_{self._views:05d}.png"
        file = self._job.ws.images_dir / path
        file.parent.mkdir(parents=True, exist_ok=True)
        scenes.render(0, "train", category, concept, self._views, self._size).save(file)
        return str(path)


def pairs_of(games: Sequence[ScoreRequest]) -> Pairs:
    """The (image, question) pairs of games, in order."""
    return [(path, game.question) for game in games for path in game.candidates]


def new_run(folder: Path, engine: str) -> Job:
    """A run with nothing in it but its config."""
    settings = ["--set", f"services.listener.engine={engine}", "--set", "services.listener.host=127.0.0.1"]
    command = [sys.executable, "-m", "hpc_rl.launch", CONFIG, "--workspace", str(folder), "--init", *settings]
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return load(folder, 0, "evaluate")


def config_of(job: Job) -> LewisConfig:
    """The run's config."""
    assert isinstance(job.config, LewisConfig)
    return job.config


@contextmanager
def service(job: Job) -> Iterator[None]:
    """The real thing, in a process of its own; clients find it by its handoff."""
    command = [sys.executable, "-m", "jobs.serve", "--workspace", str(job.ws.root), "--round", "0"]
    with (job.ws.root / "serve.log").open("wb") as log:
        server = subprocess.Popen([*command, "--service", "listener"], cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not any(job.ws.service_dir("listener").glob("*.json")):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start: {(job.ws.root / 'serve.log').read_text()[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait()


@contextmanager
def process(make: Callable[[Job], Answerer], job: Job) -> Iterator[Ask]:
    """An engine in a process of its own."""
    context = get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_answer, args=(there, make, job.ws.root), daemon=True)
    worker.start()
    there.close()

    def ask(pairs: Pairs) -> tuple[float, list[float]]:
        here.send(pairs)
        answer: tuple[float, list[float]] = here.recv()
        return answer

    try:
        yield ask
    finally:
        here.send(None)
        worker.join()


def _answer(connection: Connection, make: Callable[[Job], Answerer], folder: Path) -> None:
    answerer = make(load(folder, 0, "evaluate"))
    while (pairs := connection.recv()) is not None:
        began = time.perf_counter()
        answers = answerer(pairs)
        connection.send((time.perf_counter() - began, answers))


def bare(job: Job) -> Answerer:
    """The engine of the config: all images encoded together, all pairs answered in one call."""
    from hpc_rl.data.images import load_image
    from hpc_rl.services.listener import open_judge

    config = config_of(job)
    options = config.services.listener.model_copy(update={"max_pass_tokens": 1 << 30})
    judge = open_judge(config.listener, options)

    def answer(pairs: Pairs) -> list[float]:
        paths = list(dict.fromkeys(path for path, _ in pairs))
        images = judge.encode([judge.prepare(load_image(job.ws.images_dir / path)) for path in paths])
        by_path = dict(zip(paths, images, strict=True))
        answers = judge.yes_probabilities([(by_path[path], asked) for path, asked in pairs])
        assert all(isinstance(p, float) for p in answers), answers
        return [p for p in answers if isinstance(p, float)]

    return answer


def naive(job: Job) -> Answerer:
    """One pair at a time, through `generate` of transformers."""
    import torch

    from hpc_rl.data.images import load_image
    from hpc_rl.engines.loading import load_model, load_processor, pick_device
    from hpc_rl.engines.yes_no_prompts import surface_forms

    options = config_of(job).listener
    processor = load_processor(options.path, options.min_pixels, options.max_pixels)
    model: Any = load_model(options.path, options.dtype, options.attn_implementation, pick_device())
    yes, no = (list(surface_forms(processor.tokenizer, word)) for word in ("yes", "no"))

    @torch.inference_mode()
    def answer(pairs: Pairs) -> list[float]:
        answers = []
        for path, asked in pairs:
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            picture = load_image(job.ws.images_dir / path)
            inputs = processor(text=[prompt], images=[picture], return_tensors="pt").to(model.device)
            made = model.generate(
                **inputs, max_new_tokens=NAIVE_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            p = made.scores[0][0].float().softmax(-1)
            answers.append(float(p[yes].sum() / (p[yes].sum() + p[no].sum())))
        return answers

    return answer
