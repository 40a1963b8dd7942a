"""Tiny rendered scenes in the layout of a photo collection: the Lewis game where nothing can be downloaded.

A scene is one textured shape on a noisy grey background. The category is the shape, the concept its colour and
pattern (`red-striped`); the views of a concept differ in place, size, background, phase of the pattern and noise.

Pixels depend on nothing but (seed, split, category, concept, view, size): any shard may render any image anywhere. To
keep that true across machines and library versions, the randomness is `numpy.random.RandomState`, whose stream is
frozen (NEP 19), and the geometry uses only +, -, *, comparisons and remainders, which IEEE 754 defines to the last
bit.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc_rl.run.seeds import derive

SHAPES = ("square", "disc", "ring", "cross")
COLOURS = {
    "red": (214, 38, 38),
    "orange": (242, 140, 20),
    "yellow": (236, 222, 50),
    "green": (36, 160, 60),
    "cyan": (60, 210, 220),
    "blue": (44, 70, 220),
    "purple": (140, 50, 175),
    "white": (246, 246, 246),
}
PATTERNS = ("plain", "striped", "dotted")
SPLITS = ("train", "test")
_INK = (15, 15, 15)
_PERIOD = 8.0  # of stripes and dots, in pixels at a side of 56


def categories() -> list[str]:
    """Shapes, in a fixed order: the shards of the `prepare` stage."""
    return sorted(SHAPES)


def concepts() -> list[str]:
    """The concepts of any category: every colour with every pattern, as folder names."""
    return sorted(f"{colour}-{pattern}" for colour in COLOURS for pattern in PATTERNS)


def caption(category: str, concept: str) -> tuple[str, str]:
    """A true description of a scene.

    Returns
    -------
    coarse, detailed : str
        `("A photo of a ring", "The ring is red and striped.")` for ring, red-striped.
    """
    colour, pattern = concept.split("-")
    return f"A photo of a {category}", f"The {category} is {colour} and {pattern}."


def is_true(text: str, category: str, concept: str) -> bool:
    """Whether a text names this scene's shape, colour and pattern and no other shape, colour or pattern.

    The game's own score cannot tell a true description from a private code that speaker and listener drifted to.
    """
    words = set("".join(c if c.isalpha() else " " for c in text.lower()).split())
    colour, pattern = concept.split("-")
    vocabulary = {*SHAPES, *COLOURS, *PATTERNS}
    return words & vocabulary == {category, colour, pattern}


def render(seed: int, split: str, category: str, concept: str, view: int, size: int = 56) -> Image.Image:
    """Draw one view.

    Parameters
    ----------
    seed : int
        Seed of the whole collection.
    split : str
        `train` or `test`; the same view number gives another picture in the other split.
    category, concept : str
        One of `categories()` and of `concepts()`.
    view : int
        Number of the view, from 0.
    size : int
        Side of the square picture, in pixels.

    Returns
    -------
    PIL.Image.Image
        RGB, size × size.

    Raises
    ------
    ValueError
        If there is no such split, category or concept.
    """
    if split not in SPLITS or category not in SHAPES or concept not in concepts():
        raise ValueError(
            f"no scene {split}/{category}/{concept}: splits are {', '.join(SPLITS)}, "
            f"categories {', '.join(categories())}, concepts {', '.join(concepts())}"
        )
    colour, pattern = concept.split("-")
    rng = np.random.RandomState(derive(seed, "scene", split, category, concept, view))
    unit = size / 56.0
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    radius = (18.0 + 5.0 * rng.random_sample()) * unit
    low, span = radius + 1.0, size - 2.0 * (radius + 1.0)
    dx = x - (low + span * rng.random_sample())
    dy = y - (low + span * rng.random_sample())
    u = (x + size * rng.random_sample()) % (_PERIOD * unit)
    v = (y + size * rng.random_sample()) % (_PERIOD * unit)

    shape = _shape(category, dx, dy, radius)
    ink = shape & _pattern(pattern, u, v, _PERIOD * unit)
    grey = 95.0 + 65.0 * rng.random_sample() + 24.0 * (rng.random_sample(3) - 0.5)
    picture = np.where(shape[..., None], np.array(COLOURS[colour], dtype=np.float64), grey)
    picture = np.where(ink[..., None], np.array(_INK, dtype=np.float64), picture)
    picture = picture + rng.randint(-9, 10, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), "RGB")


def _shape(
    category: str, dx: npt.NDArray[np.float64], dy: npt.NDArray[np.float64], radius: float
) -> npt.NDArray[np.bool_]:
    distance2 = dx * dx + dy * dy
    across, along = np.minimum(abs(dx), abs(dy)), np.maximum(abs(dx), abs(dy))
    inside: npt.NDArray[np.bool_] = {
        "square": along < 0.88 * radius,
        "disc": distance2 < radius * radius,
        "ring": (distance2 < radius * radius) & (distance2 > 0.16 * radius * radius),
        "cross": (across < 0.42 * radius) & (along < radius),
    }[category]
    return inside


def _pattern(
    pattern: str, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64], period: float
) -> npt.NDArray[np.bool_]:
    half = 0.5 * period
    inked: npt.NDArray[np.bool_] = {
        "plain": np.zeros(u.shape, dtype=np.bool_),
        "striped": v < half,
        "dotted": (u - half) * (u - half) + (v - half) * (v - half) < 0.09 * period * period,
    }[pattern]
    return inked


def render_category(root: Path, seed: int, category: str, views: dict[str, int], size: int = 56) -> int:
    """Write all pictures of one category beneath `root`, as `<split>/<category>/<concept>/view_000.png`.

    Each file appears whole, by a rename, so two tasks that render the same category at once do each other no harm.
    (No fsync for each: pictures lost with a machine are rendered again, unlike what `hpc_rl.run.atomic` is for.)

    Parameters
    ----------
    root : pathlib.Path
        The image folder.
    seed, category, size
        As for `render`.
    views : dict of str to int
        Pictures of each concept, by split.

    Returns
    -------
    int
        The number of pictures.
    """
    count = 0
    for split, number in views.items():
        for concept in concepts():
            folder = root / split / category / concept
            folder.mkdir(parents=True, exist_ok=True)
            for view in range(number):
                temporary = folder / f".{secrets.token_hex(4)}.view_{view:03d}"
                render(seed, split, category, concept, view, size).save(temporary, "PNG")
                temporary.replace(folder / f"view_{view:03d}.png")
                count += 1
    return count
