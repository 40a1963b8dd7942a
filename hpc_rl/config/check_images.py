"""Does the image folder look like `<split>/<category>/<concept>/*`, and can its pictures be read?

This is a look, not an inspection. Each picture looked at is opened as far as its header; one whose end is not that of
its format is decoded, which finds files that were cut off. Of more than `LOOK_AT` pictures an equal share of every
concept is looked at. The `prepare` stage decodes all, on a compute node, and stops or skips by `data.unreadable_image`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hpc_rl.config.errors import Problem
from hpc_rl.config.lewis import DataConfig

LOOK_AT = 1000
"""Pictures that are opened at most: some seconds on a cold network file system."""

NAMED = 5
"""Unreadable pictures that a message names."""


def check_images(data: DataConfig) -> Iterator[Problem]:
    """Problems with `data.image_root`, and with the pictures in it unless unreadable ones are to be skipped."""
    # Here, not above: this is the one place where config looks into data, and Pillow is not needed to read a config.
    from hpc_rl.data.image_folder import ImageFolderError, check_folder, list_categories

    root = data.image_root
    if root is None:
        return
    field, expected = "data.image_root", "pictures as <split>/<category>/<concept>/<name>.jpg, with a split `train`"
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"the image folder {root} does not exist"
        yield Problem(field, what, expected, "correct the path, or set data.scenes to have images rendered")
        return
    try:
        categories = list(data.categories or list_categories(root))
        check_folder(root, categories, k=data.k, skip_unreadable=True)
    except ImageFolderError as error:
        yield Problem(field, str(error), expected)
        return
    concepts = _concepts(root, categories)
    total = sum(len(pictures) for pictures in concepts)
    if total == 0:
        yield Problem(field, f"there are no pictures in {root}", expected, "correct the path")
    elif data.unreadable_image == "error":
        yield from _check_pictures(_share(concepts, LOOK_AT), total)


def _check_pictures(pictures: list[Path], total: int) -> Iterator[Problem]:
    unreadable = [path for path in pictures if not _is_readable(path)]
    if not unreadable:
        return
    names = ", ".join(map(str, unreadable[:NAMED]))
    if len(unreadable) > NAMED:
        names += f" and {len(unreadable) - NAMED} more"
    looked_at = "" if len(pictures) == total else f" (looked at {len(pictures)} of {total} pictures)"
    yield Problem(
        "data.image_root",
        f"unreadable: {names}{looked_at}",
        "pictures that Pillow can decode",
        "replace or remove them, or set data.unreadable_image=skip to leave such files out",
    )


def _concepts(root: Path, categories: list[str]) -> list[list[Path]]:
    """The pictures of every concept in every split, sorted."""
    from hpc_rl.data.images import is_image_name

    found = []
    for split in _folders(root):
        for category in categories:
            for concept in _folders(split / category):
                with os.scandir(concept) as entries:
                    found.append(sorted(concept / entry.name for entry in entries if is_image_name(entry.name)))
    return found


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _share(concepts: list[list[Path]], limit: int) -> list[Path]:
    """The first pictures of each concept, equally many of each, about `limit` together and at least one of each."""
    if sum(map(len, concepts)) <= limit:
        return [path for pictures in concepts for path in pictures]
    each = max(1, limit // len(concepts))
    return [path for pictures in concepts for path in pictures[:each]]


def _is_readable(path: Path) -> bool:
    from hpc_rl.data.images import UnreadableImage, check_header, load_image

    try:
        check_header(path)
        if not _ends_well(path):
            load_image(path)
    except UnreadableImage:
        return False
    return True


def _ends_well(path: Path) -> bool:
    """Whether the last bytes are those of a whole file, as far as its format tells.

    Not every whole file ends so (phones append data to JPEGs), hence it only decides which files are worth decoding.
    """
    with path.open("rb") as file:
        head = file.read(12)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 12))
        tail = file.read(12)
    if head.startswith(b"\xff\xd8"):
        return tail.endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG"):
        return tail[4:8] == b"IEND"
    if head.startswith(b"RIFF"):
        return size >= int.from_bytes(head[4:8], "little") + 8
    return True
