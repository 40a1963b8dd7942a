"""What the tests of the listener's engines ask: pictures of all shapes, questions of all lengths."""

from __future__ import annotations

import numpy as np
from PIL import Image

PIXELS = {"min_pixels": 784, "max_pixels": 401408}
CORPUS = ["yes", "no", " yes no Yes No", 'Does this description "A. B." describe the image? Answer yes or no.', "red"]
QUESTIONS = ["red?", 'Does this description "A. B." describe the image? Answer yes or no.', "red, blue; " * 40]


def pictures() -> list[Image.Image]:
    """A small one, a tiny one, a long one, and one far above the pixel limit."""
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (20, 20), (40, 300), (3000, 2000)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
