"""Rendered scenes are the same everywhere, differ from view to view, and can be told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from hpc_rl.data import scenes
from hpc_rl.data.images import load_image


def pixels(*arguments: object, **keywords: object) -> np.ndarray:
    return np.asarray(scenes.render(*arguments, **keywords), dtype=np.int32)  # type: ignore[arg-type]


def test_a_view_has_the_same_pixels_on_every_machine() -> None:
    digest = hashlib.sha256()
    for category in scenes.categories():
        for concept in scenes.concepts():
            digest.update(scenes.render(7, "train", category, concept, view=3).tobytes())
    # Recorded once. A change means that every shipped number about the tiny game belongs to other pictures.
    assert digest.hexdigest() == "177c37bd7385553a6495492809fe2643a8123d38f261a5a4320e8ac8f7c98a6d"


@pytest.mark.parametrize("other", [(8, "train", 0), (7, "test", 0), (7, "train", 1)])
def test_seed_split_and_view_each_change_the_picture(other: tuple[int, str, int]) -> None:
    seed, split, view = other
    one = pixels(7, "train", "ring", "red-striped", 0)
    assert (one != pixels(seed, split, "ring", "red-striped", view)).mean() > 0.5


def test_colour_of_the_shape_is_the_concepts_colour() -> None:
    for colour, wanted in scenes.COLOURS.items():
        picture = pixels(7, "train", "square", f"{colour}-plain", 0)
        near = np.abs(picture - np.array(wanted)).max(-1) <= 10
        assert 0.25 < near.mean() < 0.7


@pytest.mark.parametrize("size", [28, 56, 112])
def test_size_is_the_side_in_pixels(size: int) -> None:
    assert scenes.render(7, "test", "cross", "cyan-dotted", 0, size).size == (size, size)


def test_an_unknown_concept_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no scene train/ring/mauve-plain.*red-striped"):
        scenes.render(7, "train", "ring", "mauve-plain", 0)


def test_a_category_renders_alone_and_again_to_the_same_files(tmp_path: Path) -> None:
    views = {"train": 2, "test": 1}
    assert scenes.render_category(tmp_path / "a", 7, "disc", views, 28) == 3 * len(scenes.concepts())
    scenes.render_category(tmp_path / "b", 7, "ring", views, 28)
    scenes.render_category(tmp_path / "b", 7, "disc", views, 28)
    scenes.render_category(tmp_path / "b", 7, "disc", views, 28)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files[0] == Path("test/disc/blue-dotted/view_000.png")
    for file in files:
        assert load_image(tmp_path / "a" / file).tobytes() == load_image(tmp_path / "b" / file).tobytes()
    left = [path for path in (tmp_path / "b").rglob("*") if path.is_file() and path.suffix != ".png"]
    assert not left


def test_a_caption_is_true_of_its_own_scene_only() -> None:
    coarse, detailed = scenes.caption("ring", "red-striped")
    assert (coarse, detailed) == ("A photo of a ring", "The ring is red and striped.")
    text = f"{coarse}. {detailed}"
    true_of = [(a, b) for a in scenes.categories() for b in scenes.concepts() if scenes.is_true(text, a, b)]
    assert true_of == [("ring", "red-striped")]


@pytest.mark.parametrize("text", ["The ring is red.", "The ring is red and striped and dotted.", "", "ringred striped"])
def test_a_caption_that_says_too_little_or_too_much_is_not_true(text: str) -> None:
    assert not scenes.is_true(text, "ring", "red-striped")
