"""What a workspace takes on disk, by top folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hpc_rl.reporting.data import Folder

LOOSE = "."
"""Stands for the files that lie in no folder."""


def folders(root: Path, on_error: Callable[[str], None]) -> tuple[Folder, ...]:
    """The folders beneath `root`, the largest first.

    A file with several names counts once, in the folder that is met first; links are not followed. What is removed
    meanwhile is no matter; a folder that may not be read is said to `on_error`.
    """

    def refused(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            on_error(f"{error.filename}: {error.strerror}")

    seen: set[int] = set()
    sums: dict[str, list[int]] = {}
    for folder, _, names in os.walk(root, onerror=refused):
        inside = Path(folder).relative_to(root).parts
        total = sums.setdefault(inside[0] if inside else LOOSE, [0, 0])
        for name in names:
            try:
                found = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            if found.st_nlink > 1:
                if found.st_ino in seen:
                    continue
                seen.add(found.st_ino)
            total[0] += 1
            total[1] += found.st_size
    made = (Folder(name, files, size) for name, (files, size) in sums.items() if files or name != LOOSE)
    return tuple(sorted(made, key=lambda folder: (-folder.bytes, folder.name)))
