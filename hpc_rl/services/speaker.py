"""The speaker's HTTP service: what does the model say about an image (L5)?

    POST /describe        {image_path}        → {thinking, coarse, detailed, text}
    POST /batch_describe  {"batch": [ … ]}    → {"results": [ … ], "took": seconds}
    GET  /health

`text` is the completion as it was sampled; the other three are its parts, "" for one that is not there. An item that
cannot be described has `{"error": …}` in place of its result and costs the others nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from hpc_rl.engines.base import Engine, Prompt, Request, Sampling
from hpc_rl.grading.lewis import parse, thinking
from hpc_rl.services.batching import Batcher, ModelFailed, Overloaded
from hpc_rl.services.images import MAX_PATH_CHARACTERS, ImageRefused, ImageRoots
from hpc_rl.services.server import RETRY_AFTER_S


@dataclass(frozen=True)
class Undescribed:
    """Why an image has no description."""

    reason: str


class Describer:
    """Turns a batch of image paths into completions. Not for several threads: engines run one batch at a time.

    Parameters
    ----------
    engine
        With the speaker's weights in it.
    roots
        Where images may be opened.
    problem
        What the speaker is asked about each image (`data.speaker_problem`).
    sampling
        Temperature and length.
    seed_of
        The seed of an image's completion, by its path; of no effect on greedy ones.
    """

    def __init__(
        self, engine: Engine, roots: ImageRoots, *, problem: str, sampling: Sampling, seed_of: Callable[[str], int]
    ) -> None:
        self._engine, self._roots, self._problem = engine, roots, problem
        self._sampling, self._seed_of = sampling, seed_of

    def __call__(self, paths: Sequence[str]) -> list[str | Undescribed]:
        """The completion for each path, in order; the same path twice is described once."""
        images = {path: self._load(path) for path in dict.fromkeys(paths)}
        requests = {
            path: Request(Prompt.of(self._problem, image), self._seed_of(path))
            for path, image in images.items()
            if isinstance(image, Image.Image)
        }
        said = dict(zip(requests, self._generate(list(requests.values())), strict=True))
        refused = {path: image for path, image in images.items() if isinstance(image, Undescribed)}
        answers = {**refused, **said}
        return [answers[path] for path in paths]

    def _load(self, path: str) -> Image.Image | Undescribed:
        try:
            with self._roots.open(path) as file:
                return file.decode()
        except ImageRefused as error:
            return Undescribed(str(error))

    def _generate(self, requests: Sequence[Request]) -> list[str | Undescribed]:
        if not requests:
            return []
        self._engine.forget()
        try:
            return [made.text for made in self._engine.generate(requests, self._sampling)]
        except ValueError as error:  # the processor refuses one of the images, e.g. for its aspect ratio: which one?
            if len(requests) == 1:
                return [Undescribed(f"the model refuses the image: {error}")]
            return [answer for request in requests for answer in self._generate([request])]


class DescribeBody(BaseModel):
    """One image."""

    model_config = ConfigDict(extra="forbid")

    image_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS)]
    """Beneath the image root, relative to it; an absolute path is taken where it lies beneath it."""


class BatchBody(BaseModel):
    """Many images."""

    model_config = ConfigDict(extra="forbid")

    batch: list[DescribeBody]


class DescribeAnswer(BaseModel):
    """What the speaker says about one image."""

    thinking: str
    coarse: str
    detailed: str
    text: str
    """The whole completion."""


class ErrorAnswer(BaseModel):
    """Why one image has no description."""

    error: str


class BatchAnswer(BaseModel):
    """Answers in the order of the batch."""

    results: list[DescribeAnswer | ErrorAnswer]
    took: float
    """Seconds, the wait for a turn included."""


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body is no JSON"},
    401: {"description": "no token, or the wrong one"},
    413: {"description": "the body or the batch is too large: send fewer items at once"},
    422: {"description": "the body is not as documented, or (/describe) the image cannot be described"},
    500: {"description": "the model failed"},
    503: {"description": "busy or leaving: try again after Retry-After, or ask another replica"},
}
SpeakerBatcher = Batcher[str, "str | Undescribed"]


def create_app(batcher: SpeakerBatcher, *, max_images: int, acquire_timeout_s: float) -> FastAPI:
    """The speaker's routes; `hpc_rl.services.server` puts its guard around them.

    Parameters
    ----------
    batcher
        Runs a `Describer`, in one worker.
    max_images
        Most images in one request.
    acquire_timeout_s
        Longest wait of a request for its turn (INFERENCE_ACQUIRE_TIMEOUT).
    """
    app = FastAPI(title="hpc_rl speaker", version="1")

    async def answer(batch: Sequence[DescribeBody]) -> list[DescribeAnswer | ErrorAnswer]:
        if len(batch) > max_images:
            raise HTTPException(413, f"{len(batch)} images in one request; at most {max_images}")
        try:
            said = await batcher.submit([body.image_path for body in batch], acquire_timeout_s)
        except Overloaded as error:
            raise HTTPException(503, f"busy: {error}", headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        except ModelFailed as error:
            raise HTTPException(500, f"the model failed: {error}") from error
        return [_answer(text) for text in said]

    @app.post("/describe", responses=REFUSALS)
    async def describe_one(body: DescribeBody) -> DescribeAnswer:
        """Describe one image."""
        (result,) = await answer([body])
        if isinstance(result, ErrorAnswer):
            raise HTTPException(422, result.error)
        return result

    @app.post("/batch_describe", responses=REFUSALS)
    async def batch_describe(body: BatchBody) -> BatchAnswer:
        """Describe many images; one that cannot be described has an error in its place."""
        started = time.perf_counter()
        results = await answer(body.batch)
        return BatchAnswer(results=results, took=round(time.perf_counter() - started, 6))

    return app


def _answer(said: str | Undescribed) -> DescribeAnswer | ErrorAnswer:
    if isinstance(said, Undescribed):
        return ErrorAnswer(error=said.reason)
    found = parse(said)
    coarse, detailed = (found.coarse, found.detailed) if found else ("", "")
    return DescribeAnswer(thinking=thinking(said), coarse=coarse, detailed=detailed, text=said)


def describe(batcher: SpeakerBatcher, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `/health` tells those who have the token."""
    counters = {name: round(value, 3) for name, value in asdict(batcher.counters).items()}
    return {**about, "waiting_images": batcher.waiting, "counters": counters}
