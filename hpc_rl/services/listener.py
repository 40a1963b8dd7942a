"""The listener's HTTP service: which candidate does a description mean (L1–L4)?

    POST /score        {candidate_paths, question, topk}  → {yes_probabilities, predicted_index}
    POST /batch_score  {"batch": [ … ]}                   → {"results": [ … ], "took": seconds}
    GET  /health

`predicted_index` is -1 for a tie and where a P(yes) is no number (null in `yes_probabilities`): neither ever counts as
right. An item that cannot be scored has `{"error": …}` in place of its result and costs the others nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Protocol

import torch
from fastapi import FastAPI, HTTPException
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from hpc_rl.engines.yes_no import EncodedImage
from hpc_rl.grading.lewis import decide
from hpc_rl.services.batching import Batcher, ModelFailed, Overloaded
from hpc_rl.services.images import MAX_PATH_CHARACTERS, Identity, ImageRefused, ImageRoots
from hpc_rl.services.server import RETRY_AFTER_S

CACHE_BYTES = 1 << 30
DECODERS = 4
MAX_CANDIDATES = 256
MAX_QUESTION_CHARACTERS = 20_000


@dataclass(frozen=True)
class Pair:
    """One question about one image."""

    path: str
    question: str


@dataclass(frozen=True)
class Unscorable:
    """Why a pair has no P(yes)."""

    reason: str


class Judge(Protocol):
    """What the service needs of a model; `hpc_rl.engines.yes_no.YesNoModel` is one."""

    def check_question(self, question: str) -> None:
        """Raise ValueError for a question that cannot be asked."""

    def prepare_pixels(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixel values and grid of an image; ValueError when it cannot be used."""

    def encode(self, pixels: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[EncodedImage]:
        """What is kept of images between questions."""

    def yes_probabilities(self, pairs: Sequence[tuple[EncodedImage, str]]) -> list[float]:
        """P(yes) of each pair."""


class ImageCache:
    """Encoded images by what their file held, the least recently used ones dropped when they exceed `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._images: OrderedDict[Identity, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(self, identity: Identity) -> EncodedImage | None:
        """The image, marked as just used; None when it is not kept."""
        with self._lock:
            image = self._images.get(identity)
            if image is None:
                self.misses += 1
            else:
                self.hits += 1
                self._images.move_to_end(identity)
            return image

    def put(self, identity: Identity, image: EncodedImage) -> None:
        """Keep an image."""
        with self._lock:
            if identity in self._images:
                return
            self._images[identity] = image
            self._bytes += image.nbytes
            while self._bytes > self._max_bytes and len(self._images) > 1:
                self._bytes -= self._images.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class _Loaded:
    identity: Identity
    encoded: EncodedImage | None
    pixels: tuple[torch.Tensor, torch.Tensor] | None


class Scorer:
    """Turns a batch of pairs into probabilities: opens images, encodes those not seen before, one forward pass.

    Parameters
    ----------
    model
        The listener's model.
    roots
        Where images may be opened.
    cache_bytes
        Memory for encoded images.
    """

    def __init__(self, model: Judge, roots: ImageRoots, cache_bytes: int = CACHE_BYTES) -> None:
        self._model, self._roots = model, roots
        self.cache = ImageCache(cache_bytes)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def close(self) -> None:
        """End its threads."""
        self._decoders.shutdown()

    def __call__(self, pairs: Sequence[Pair]) -> list[float | Unscorable]:
        """P(yes) of each pair, in order; the same pair twice is asked once and has one answer."""
        images = self._images(list(dict.fromkeys(pair.path for pair in pairs)))
        answers: dict[Pair, float | Unscorable] = {}
        asked: list[tuple[Pair, EncodedImage]] = []
        for pair in dict.fromkeys(pairs):
            image = images[pair.path]
            refused = image if isinstance(image, Unscorable) else self._refused(pair.question)
            if refused is not None:
                answers[pair] = refused
            elif isinstance(image, EncodedImage):
                asked.append((pair, image))
        scores = self._model.yes_probabilities([(image, pair.question) for pair, image in asked])
        answers.update({pair: score for (pair, _), score in zip(asked, scores, strict=True)})
        return [answers[pair] for pair in pairs]

    def _refused(self, question: str) -> Unscorable | None:
        try:
            self._model.check_question(question)
        except ValueError as error:
            return Unscorable(str(error))
        return None

    def _images(self, paths: Sequence[str]) -> dict[str, EncodedImage | Unscorable]:
        found = dict(zip(paths, self._decoders.map(self._load, paths), strict=True))
        fresh = {f.identity: f.pixels for f in found.values() if isinstance(f, _Loaded) and f.pixels is not None}
        encoded = dict(zip(fresh, self._model.encode(list(fresh.values())), strict=True))
        for identity, image in encoded.items():
            self.cache.put(identity, image)
        return {
            path: f if isinstance(f, Unscorable) else (f.encoded or encoded[f.identity]) for path, f in found.items()
        }

    def _load(self, path: str) -> _Loaded | Unscorable:
        try:
            with self._roots.open(path) as file:
                kept = self.cache.get(file.identity)
                if kept is not None:
                    return _Loaded(file.identity, kept, None)
                return _Loaded(file.identity, None, self._model.prepare_pixels(file.decode()))
        except ImageRefused as error:
            return Unscorable(str(error))
        except ValueError as error:
            return Unscorable(f"the image processor refuses the image: {error}")


class ScoreBody(BaseModel):
    """One game: a question about each candidate image."""

    model_config = ConfigDict(extra="forbid")

    candidate_paths: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARACTERS)]],
        Field(min_length=1, max_length=MAX_CANDIDATES),
    ]
    """Images beneath the image root, relative to it; absolute paths are taken where they lie beneath it."""
    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION_CHARACTERS)]
    """Asked about each of them."""
    topk: Annotated[int, Field(ge=1)] = 1
    """With more than 1 the answer has `top_indices` too: that many candidates by falling P(yes)."""


class BatchBody(BaseModel):
    """Many games."""

    model_config = ConfigDict(extra="forbid")

    batch: list[ScoreBody]


class ScoreAnswer(BaseModel):
    """What the listener makes of one game."""

    yes_probabilities: list[float | None]
    """P(yes) of each candidate, in order; null where it is no number."""
    predicted_index: int
    """The candidate with the largest P(yes); -1 for a tie and where one is null."""


class TopAnswer(ScoreAnswer):
    """The answer to a game with `topk` above 1."""

    top_indices: list[int]
    """Candidates by falling P(yes), at most `topk`; those without a number last."""


class ErrorAnswer(BaseModel):
    """Why one game has no answer."""

    error: str


class BatchAnswer(BaseModel):
    """Answers in the order of the batch."""

    results: list[TopAnswer | ScoreAnswer | ErrorAnswer]
    took: float
    """Seconds, the wait for a turn included."""


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body is no JSON"},
    401: {"description": "no token, or the wrong one"},
    413: {"description": "the body or the batch is too large: send fewer items at once"},
    422: {"description": "the body is not as documented, or (/score) the game cannot be scored"},
    500: {"description": "the model failed"},
    503: {"description": "busy or leaving: try again after Retry-After, or ask another replica"},
}
ListenerBatcher = Batcher[Pair, "float | Unscorable"]


def create_app(batcher: ListenerBatcher, *, max_pairs: int, acquire_timeout_s: float) -> FastAPI:
    """The listener's routes; `hpc_rl.services.server` puts its guard around them.

    Parameters
    ----------
    batcher
        Runs a `Scorer`.
    max_pairs
        Most image–question pairs in one request.
    acquire_timeout_s
        Longest wait of a request for its turn (INFERENCE_ACQUIRE_TIMEOUT).
    """
    app = FastAPI(title="hpc_rl listener", version="1")

    async def answer(batch: Sequence[ScoreBody]) -> list[TopAnswer | ScoreAnswer | ErrorAnswer]:
        pairs = [Pair(path, body.question) for body in batch for path in body.candidate_paths]
        if len(pairs) > max_pairs:
            raise HTTPException(413, f"{len(pairs)} image-question pairs in one request; at most {max_pairs}")
        try:
            scores = await batcher.submit(pairs, acquire_timeout_s)
        except Overloaded as error:
            raise HTTPException(503, f"busy: {error}", headers={"Retry-After": str(RETRY_AFTER_S)}) from error
        except ModelFailed as error:
            raise HTTPException(500, f"the model failed: {error}") from error
        rest = iter(scores)
        return [_answer(body, [next(rest) for _ in body.candidate_paths]) for body in batch]

    @app.post("/score", responses=REFUSALS)
    async def score(body: ScoreBody) -> TopAnswer | ScoreAnswer:
        """Score one game."""
        (result,) = await answer([body])
        if isinstance(result, ErrorAnswer):
            raise HTTPException(422, result.error)
        return result

    @app.post("/batch_score", responses=REFUSALS)
    async def batch_score(body: BatchBody) -> BatchAnswer:
        """Score many games; an item that cannot be scored has an error in its place."""
        started = time.perf_counter()
        results = await answer(body.batch)
        return BatchAnswer(results=results, took=round(time.perf_counter() - started, 6))

    return app


def _answer(body: ScoreBody, scores: Sequence[float | Unscorable]) -> TopAnswer | ScoreAnswer | ErrorAnswer:
    for place, score in enumerate(scores):
        if isinstance(score, Unscorable):
            return ErrorAnswer(error=f"candidate {place}: {score.reason}")
    numbers = [score for score in scores if isinstance(score, float)]
    said = [None if math.isnan(p) else p for p in numbers]
    if body.topk == 1:
        return ScoreAnswer(yes_probabilities=said, predicted_index=decide(numbers))
    order = sorted(range(len(numbers)), key=lambda i: (math.isnan(numbers[i]), -numbers[i]))
    return TopAnswer(yes_probabilities=said, predicted_index=decide(numbers), top_indices=order[: body.topk])


def describe(batcher: ListenerBatcher, scorer: Scorer, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `/health` tells those who have the token."""
    counters = {name: round(value, 3) for name, value in asdict(batcher.counters).items()}
    cache = {"hits": scorer.cache.hits, "misses": scorer.cache.misses}
    return {**about, "waiting_pairs": batcher.waiting, "counters": counters, "image_cache": cache}
