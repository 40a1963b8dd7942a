"""From a batch of (image path, question) to probabilities: each image opened and encoded once, one forward pass."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from hpc_rl.engines.yes_no import EncodedImage
from hpc_rl.services.images import Identity, ImageRefused, ImageRoots

CACHE_BYTES = 1 << 30
DECODERS = 4


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
