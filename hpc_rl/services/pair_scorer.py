"""From (image, question) pairs to probabilities: each image encoded once, each question about it asked once."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from hpc_rl.engines.yes_no_prompts import Unscorable
from hpc_rl.services.frame import TokenCounts
from hpc_rl.services.images import Identity, ImageRefused, ImageRoots, ImageSource

CACHE_BYTES = 1 << 30
CACHE_ANSWERS = 1 << 17
"""Some 50 MiB."""
DECODERS = 4


@dataclass(frozen=True)
class Pair:
    """One question about one image."""

    image: ImageSource
    question: str


class EncodedImage(Protocol):
    """An image that an engine is ready to be asked about."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""


class Judge(Protocol):
    """An engine that answers yes/no questions about images: `YesNoModel` (transformers) or `YesNoVllm`.

    What it makes of an image is its own affair: nobody else looks into it.
    """

    def prepare(self, image: Image.Image) -> Any:
        """An image on its way to `encode`, in any thread; ValueError when it cannot be used."""

    def encode(self, prepared: Sequence[Any]) -> Sequence[EncodedImage]:
        """What is kept of images between questions."""

    def yes_probabilities(self, pairs: Sequence[tuple[Any, str]]) -> Sequence[float | Unscorable]:
        """P(yes) of each (encoded image, question), NaN where there is none; or why it cannot be asked."""

    @property
    def tokens_made(self) -> int:
        """Tokens of all prompts so far."""


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


class AnswerCache:
    """P(yes) by what the image file held and by the question, for all clients: the least recently used are dropped.

    Whoever asks again gets the first answer to the bit, also when it would be computed in another batch.
    """

    def __init__(self, max_answers: int) -> None:
        self._max_answers = max_answers
        self._answers: OrderedDict[tuple[Identity, bytes], float] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        """How many answers are kept."""
        return len(self._answers)

    def get(self, identity: Identity, question: str) -> float | None:
        """The answer, marked as just used; None when it is not kept."""
        key = identity, _digest(question)
        with self._lock:
            score = self._answers.get(key)
            if score is None:
                self.misses += 1
            else:
                self.hits += 1
                self._answers.move_to_end(key)
            return score

    def keep(self, identity: Identity, question: str, score: float) -> float:
        """Keep an answer, unless it is no number; the answer to give: another batch's, where that one was earlier."""
        if math.isnan(score):
            return score
        with self._lock:
            score = self._answers.setdefault((identity, _digest(question)), score)
            while len(self._answers) > self._max_answers:
                self._answers.popitem(last=False)
            return score


def _digest(question: str) -> bytes:
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class _Loaded:
    """An image, and what is known about it; neither encoded nor prepared when all its questions have answers."""

    identity: Identity
    known: Mapping[str, float]
    encoded: EncodedImage | None = None
    prepared: Any = None


class PairScorer:
    """Turns a batch of pairs into probabilities: opens images, encodes those not seen before, one forward pass.

    What was answered before is not asked again. Every image is opened all the same: whether a path may be read, and
    which content it stands for, is judged for each request.

    Parameters
    ----------
    model
        The listener's model.
    roots
        Where images may be opened.
    cache_bytes
        Memory for encoded images.
    cache_answers
        Most answers to keep.
    """

    def __init__(
        self, model: Judge, roots: ImageRoots, cache_bytes: int = CACHE_BYTES, cache_answers: int = CACHE_ANSWERS
    ) -> None:
        self._model, self._roots = model, roots
        self._tokens_before = model.tokens_made
        self.tokens = TokenCounts()
        self.cache = ImageCache(cache_bytes)
        self.answers = AnswerCache(cache_answers)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    def close(self) -> None:
        """End its threads."""
        self._decoders.shutdown()

    def __call__(self, pairs: Sequence[Pair]) -> list[float | Unscorable]:
        """P(yes) of each pair, in order; the same pair twice is asked once and has one answer."""
        questions: dict[ImageSource, list[str]] = {}
        for pair in dict.fromkeys(pairs):
            questions.setdefault(pair.image, []).append(pair.question)
        images = dict(zip(questions, self._decoders.map(self._load, questions, questions.values()), strict=True))
        encoded = self._encode([image for image in images.values() if isinstance(image, _Loaded)])
        answers: dict[Pair, float | Unscorable] = {}
        asked: list[tuple[Pair, Identity]] = []
        for pair in dict.fromkeys(pairs):
            image = images[pair.image]
            if isinstance(image, Unscorable):
                answers[pair] = image
            elif pair.question in image.known:
                answers[pair] = image.known[pair.question]
            else:
                asked.append((pair, image.identity))
        scores = self._model.yes_probabilities([(encoded[identity], pair.question) for pair, identity in asked])
        for (pair, identity), score in zip(asked, scores, strict=True):
            if isinstance(score, float):
                score = self.answers.keep(identity, pair.question, score)
            answers[pair] = score
        self.tokens.prompt = self._model.tokens_made - self._tokens_before
        return [answers[pair] for pair in pairs]

    def _encode(self, images: Sequence[_Loaded]) -> dict[Identity, EncodedImage]:
        """The images that there is something to ask about."""
        encoded = {image.identity: image.encoded for image in images if image.encoded is not None}
        fresh = {image.identity: image.prepared for image in images if image.prepared is not None}
        if fresh:
            made = dict(zip(fresh, self._model.encode(list(fresh.values())), strict=True))
            for identity, image in made.items():
                self.cache.put(identity, image)
            encoded |= made
        return encoded

    def _load(self, source: ImageSource, questions: Sequence[str]) -> _Loaded | Unscorable:
        try:
            with self._roots.open(source) as file:
                found = {question: self.answers.get(file.identity, question) for question in questions}
                known = {question: score for question, score in found.items() if score is not None}
                if len(known) == len(questions):
                    return _Loaded(file.identity, known)
                kept = self.cache.get(file.identity)
                if kept is not None:
                    return _Loaded(file.identity, known, encoded=kept)
                return _Loaded(file.identity, known, prepared=self._model.prepare(file.decode()))
        except ImageRefused as error:
            return Unscorable(str(error))
        except ValueError as error:
            return Unscorable(f"the image processor refuses the image: {error}")
