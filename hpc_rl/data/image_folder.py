"""Catalog of an image folder `<split>/<category>/<concept>/*`, and which concepts and pictures may be trained on.

    train/square/red-striped/view_000.png
    test/square/red-striped/view_000.png      (the split `test` is optional)

A *concept* is one thing seen in several pictures (its views): this mug, that dog, red-striped squares. Concepts of
one *category* are alike, and the game is to tell them apart. Some concepts of every category are held out from
training altogether.

Everything works category by category, so that a category is a shard of the `prepare` stage. Nothing here imports more
than the standard library and Pillow: `launch` lists categories and checks folders on the login node.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path

from hpc_rl.data.images import UnreadableImage, check_header, is_image_name, load_image
from hpc_rl.run.seeds import seeded_order


class ImageFolderError(ValueError):
    """An image folder that no game can be made from; the message names the place and the ways out."""


@dataclass(frozen=True)
class Concept:
    """One concept and its pictures, as paths relative to the image folder, sorted.

    Attributes
    ----------
    category, name : str
        Folder names.
    held_out : bool
        Whether it belongs to the validation concepts, which no training game shows.
    train_views : tuple of str
        Pictures that training games (or, of a held-out concept, validation games) may show.
    new_views : tuple of str
        Pictures of a training concept that training never shows; empty for held-out concepts.
    """

    category: str
    name: str
    held_out: bool
    train_views: tuple[str, ...]
    new_views: tuple[str, ...]


@dataclass(frozen=True)
class Catalog:
    """The concepts of one category, sorted by name, and the pictures that could not be read and were left out."""

    category: str
    concepts: tuple[Concept, ...]
    skipped: tuple[str, ...]


def list_categories(root: Path) -> list[str]:
    """Categories of an image folder: the folders in its `train` split, sorted.

    Raises
    ------
    ImageFolderError
        If the folder or its `train` split is missing or empty.
    """
    found = _folders(root / "train")
    if not found:
        raise ImageFolderError(
            f"no categories in {root / 'train'}. Expected pictures as {root}/train/<category>/<concept>/<name>.jpg; "
            "set data.image_root to a folder of that layout, or data.scenes to render one."
        )
    return found


def split_concepts(names: Sequence[str], category: str, *, k: int, fraction: float, seed: int) -> frozenset[str]:
    """Choose the held-out concepts of a category.

    Parameters
    ----------
    names : sequence of str
        All concepts of the category.
    category : str
        Its name; part of the seed.
    k : int
        Candidates per game: at least this many concepts stay in training, since a game needs k different ones.
    fraction : float
        Share of concepts to hold out, rounded to the nearest number.
    seed : int
        data.split_seed.

    Raises
    ------
    ImageFolderError
        If there are fewer than k concepts.
    """
    if len(names) < k:
        raise ImageFolderError(
            f"category {category!r} has {len(names)} concept(s) ({', '.join(names) or 'none'}), but a game with "
            f"data.k={k} candidates needs at least {k}. Add concepts, lower data.k, or leave the category out of "
            "data.categories."
        )
    number = min(round(fraction * len(names)), len(names) - k)
    return frozenset(seeded_order(names, seed, "split", category)[:number])


def catalog(
    root: Path,
    category: str,
    *,
    k: int,
    validation_fraction: float,
    split_seed: int,
    new_views_per_concept: int,
    skip_unreadable: bool,
) -> Catalog:
    """List one category, decode every picture once, and split it.

    Where the folder has a split `test`, its pictures of training concepts are their new views. Where it has not,
    `new_views_per_concept` pictures of each training concept are set aside instead. A held-out concept uses the
    pictures of both splits.

    Parameters
    ----------
    root : pathlib.Path
        The image folder.
    category : str
        Folder name within its splits.
    k, validation_fraction, split_seed
        As for `split_concepts`.
    new_views_per_concept : int
        Used only where there is no `test` split.
    skip_unreadable : bool
        Leave unreadable pictures out (and name them in the result) instead of raising.

    Raises
    ------
    UnreadableImage
        For the first picture that cannot be decoded, unless `skip_unreadable`.
    ImageFolderError
        If the category has too few concepts or a concept too few pictures.
    """
    names = _folders(root / "train" / category)
    held_out = split_concepts(names, category, k=k, fraction=validation_fraction, seed=split_seed)
    has_test = (root / "test").is_dir()
    skipped: list[str] = []
    concepts = []
    for name in names:
        train = _readable(root, f"train/{category}/{name}", skip_unreadable, skipped)
        test = _readable(root, f"test/{category}/{name}", skip_unreadable, skipped) if has_test else []
        if name in held_out:
            train, new = sorted(train + test), []
        elif has_test:
            new = test
        else:
            new = seeded_order(train, split_seed, "new_views", category, name)[:new_views_per_concept]
            train = [path for path in train if path not in set(new)]
        concept = Concept(category, name, name in held_out, tuple(train), tuple(sorted(new)))
        _check_views(root, concept, has_test)
        concepts.append(concept)
    return Catalog(category, tuple(concepts), tuple(skipped))


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return []


def _readable(root: Path, folder: str, skip_unreadable: bool, skipped: list[str]) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(root / folder) if is_image_name(name))
    except FileNotFoundError:
        return []
    readable = []
    for name in names:
        try:
            load_image(root / folder / name)
        except UnreadableImage:
            if not skip_unreadable:
                raise
            skipped.append(f"{folder}/{name}")
        else:
            readable.append(f"{folder}/{name}")
    return readable


def _check_views(root: Path, concept: Concept, has_test: bool) -> None:
    wanted = {"validation": concept.train_views}
    if not concept.held_out:
        wanted = {"training": concept.train_views, "new-view": concept.new_views}
    for purpose, views in wanted.items():
        if len(views) < 2:
            place = f"{concept.category}/{concept.name}"
            where = f"{root}/train/{place}" + (f" and {root}/test/{place}" if has_test else "")
            setting = "" if has_test else ", change data.new_views_per_concept (the pictures set aside for new views)"
            raise ImageFolderError(
                f"concept {place} has {len(views)} readable picture(s) for {purpose} games, which show two of them "
                f"(the target and another view of it). Add pictures to {where}{setting}, or remove the concept."
            )


def check_folder(root: Path, categories: Sequence[str], *, k: int, skip_unreadable: bool) -> None:
    """The checks that need no decoding, for the login node before anything is submitted.

    Looks at every folder name, and at the first bytes of every picture unless unreadable ones are to be skipped. A
    picture that is cut off further down is found by `catalog`, in the `prepare` stage.

    Raises
    ------
    ImageFolderError
        If a category is missing or has fewer than k concepts.
    UnreadableImage
        For the first file that is called a picture and does not begin like one.
    """
    known = list_categories(root)
    for category in categories:
        if category not in known:
            raise ImageFolderError(f"no category {category!r} in {root / 'train'}; there are: {', '.join(known)}")
        names = _folders(root / "train" / category)
        split_concepts(names, category, k=k, fraction=0.0, seed=0)
        if skip_unreadable:
            continue
        for path in sorted(root.glob(f"*/{glob_escape(category)}/*/*")):
            if is_image_name(path.name):
                check_header(path)
