"""The speaker's HTTP service: what does the model say about an image (L5)?

    POST /describe        {image_path}        → {thinking, coarse, detailed, text}
                          {image}, the image itself in base64: the same
    POST /batch_describe  {"batch": [ … ]}    → {"results": [ … ], "took": seconds}
    GET  /health

`text` is the completion as it was sampled; the other three are its parts, "" for one that is not there. An item that
cannot be described has `{"error": …}` in place of its result and costs the others nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from PIL import Image
from pydantic import ConfigDict, Field, JsonValue, model_validator

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.schema import Config
from hpc_rl.config.services import SpeakerServiceConfig
from hpc_rl.data.lewis import image_root
from hpc_rl.engines.base import Completion, Engine, Prompt, Request, Sampling, generate_each
from hpc_rl.grading.lewis import parse, thinking
from hpc_rl.run.seeds import derive
from hpc_rl.run.workspace import Workspace
from hpc_rl.services.frame import CannotServe, Desk, Service
from hpc_rl.services.images import MAX_PATH_CHARACTERS, ImageRefused, ImageRoots, ImageSource, InlineImage, name_of
from hpc_rl.services.openapi import REFUSALS, Answer, Body, Listed, new_app


@dataclass(frozen=True)
class Undescribed:
    """Why an image has no description."""

    reason: str


class Describer:
    """Turns a batch of images into completions. Not for several threads: engines run one batch at a time.

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
        The seed of an image's completion, by its path or hash; of no effect on greedy ones.
    """

    def __init__(
        self, engine: Engine, roots: ImageRoots, *, problem: str, sampling: Sampling, seed_of: Callable[[str], int]
    ) -> None:
        self._engine, self._roots, self._problem = engine, roots, problem
        self._sampling, self._seed_of = sampling, seed_of

    def __call__(self, sources: Sequence[ImageSource]) -> list[str | Undescribed]:
        """The completion for each image, in order; the same one twice is described once."""
        images = {source: self._load(source) for source in dict.fromkeys(sources)}
        requests = {
            source: Request(Prompt.of(self._problem, image), self._seed_of(name_of(source)))
            for source, image in images.items()
            if isinstance(image, Image.Image)
        }
        answers: dict[ImageSource, str | Undescribed] = {
            source: image for source, image in images.items() if isinstance(image, Undescribed)
        }
        made = generate_each(self._engine, [(request, self._sampling) for request in requests.values()])
        for source, one in zip(requests, made, strict=True):
            # The processor refuses an image for its aspect ratio, for example.
            said = one.text if isinstance(one, Completion) else Undescribed(f"the model refuses the image: {one}")
            answers[source] = said
        return [answers[source] for source in sources]

    def _load(self, source: ImageSource) -> Image.Image | Undescribed:
        try:
            with self._roots.open(source) as file:
                return file.decode()
        except ImageRefused as error:
            return Undescribed(str(error))


IMAGE: dict[str, JsonValue] = {"image_path": "/path/to/img1.jpg"}
COARSE, DETAILED = "A photo of a golden retriever", "The dog has fluffy golden fur and wears a red collar."
DESCRIBED: dict[str, JsonValue] = {
    "thinking": "A dog.",
    "coarse": COARSE,
    "detailed": DETAILED,
    "text": f"<thinking>A dog.</thinking>\n<coarse>{COARSE}</coarse>\n<detailed>{DETAILED}</detailed>",
}
EITHER: list[JsonValue] = [{"required": ["image_path"]}, {"required": ["image"]}]


class DescribeBody(Body):
    """One image."""

    model_config = ConfigDict(json_schema_extra={"examples": [IMAGE], "oneOf": EITHER})

    image_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS, default_factory=str)]
    """Beneath the image root, relative to it; an absolute path is taken where it lies beneath it."""
    image: Annotated[str, Field(min_length=1, default_factory=str)]
    """In place of `image_path`: the image file itself, in base64 (RFC 4648, section 4; no `data:` URL)."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.image_path) == bool(self.image):
            raise ValueError("one of image_path and image is needed, and not both")
        return self

    @property
    def source(self) -> ImageSource:
        """The image, in either form."""
        return self.image_path or InlineImage(self.image)


class BatchBody(Body):
    """Many images."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"batch": [IMAGE]}]})

    batch: Listed[DescribeBody]


class DescribeAnswer(Answer):
    """What the speaker says about one image; a part that is not there is ""."""

    model_config = ConfigDict(json_schema_extra={"examples": [DESCRIBED]})

    thinking: str
    coarse: str
    detailed: str
    text: str
    """The whole completion."""


class ErrorAnswer(Answer):
    """Why one image has no description."""

    error: str


class BatchAnswer(Answer):
    """Answers in the order of the batch."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"results": [DESCRIBED], "took": 2.5}]})

    results: list[DescribeAnswer | ErrorAnswer]
    took: float
    """Seconds, the wait for a turn included."""


SpeakerDesk = Desk[ImageSource, "str | Undescribed"]


def open_service(ws: Workspace, config: Config, round: int, options: SpeakerServiceConfig) -> Service:
    """The speaker after `round`, with the settings of `sample`, greedy unless `evaluate.temperature` says not.

    Raises
    ------
    CannotServe
        When the run has none, or that round's training is not done.
    """
    from hpc_rl.engines.engine_spec import EngineSpec
    from hpc_rl.engines.opening import open_engine
    from hpc_rl.engines.weights import Role, weights_of

    if not isinstance(config, LewisConfig):
        raise CannotServe(
            f"a run of the recipe {config.recipe} has no speaker, so there is nothing to serve: `lewis` has one"
        )
    try:
        weights = weights_of(ws, Role("speaker", config.speaker), round)
    except FileNotFoundError:
        raise CannotServe(
            f"round {round} train of {ws.root} is not done: there are no weights yet. --round 0 serves the base model"
        ) from None
    sample = config.sample
    engine = open_engine(EngineSpec(sample.engine, config.speaker, sample, weights, ws.compile_cache))
    describer = Describer(
        engine,
        ImageRoots([image_root(ws, config.data.image_root)], options),
        problem=config.data.speaker_problem,
        sampling=Sampling(config.evaluate.temperature, config.sample.max_tokens),
        seed_of=lambda path: derive(config.run.seed, round, "describe", path),
    )
    desk: SpeakerDesk = Desk(describer, options, workers=1)
    about = {"model": config.speaker.path, "round": round, "engine": engine.kind}
    return Service("speaker", create_app(desk), desk.batcher, weights.hash, about)


def create_app(desk: SpeakerDesk) -> FastAPI:
    """The speaker's routes."""
    app = new_app("speaker", "What does the model say about an image?")

    async def answer(request: HttpRequest, batch: Sequence[DescribeBody]) -> list[DescribeAnswer | ErrorAnswer]:
        return [_answer(text) for text in await desk.ask(request, [body.source for body in batch])]

    @app.post("/describe", responses=REFUSALS)
    async def describe_one(request: HttpRequest, body: DescribeBody) -> DescribeAnswer:
        """Describe one image."""
        (result,) = await answer(request, [body])
        if isinstance(result, ErrorAnswer):
            raise HTTPException(422, result.error)
        return result

    @app.post("/batch_describe", responses=REFUSALS)
    async def batch_describe(request: HttpRequest, body: BatchBody) -> BatchAnswer:
        """Describe many images; one that cannot be described has an error in its place."""
        started = time.perf_counter()
        results = await answer(request, body.batch)
        return BatchAnswer(results=results, took=round(time.perf_counter() - started, 6))

    return app


def _answer(said: str | Undescribed) -> DescribeAnswer | ErrorAnswer:
    if isinstance(said, Undescribed):
        return ErrorAnswer(error=said.reason)
    found = parse(said)
    coarse, detailed = (found.coarse, found.detailed) if found else ("", "")
    return DescribeAnswer(thinking=thinking(said), coarse=coarse, detailed=detailed, text=said)
