"""The files of a model folder: which of them are read, how much they are, and what tells them apart from others."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from safetensors import safe_open

UNREAD = (".bin", ".pt", ".pth", ".bin.index.json", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files that are never read: the weights in other formats, mostly pickles."""
COPYING_THREADS = 4


def model_files(folder: Path) -> dict[str, os.stat_result]:
    """The files of a model that are read, links followed, by name, with what the file system says of each.

    Raises
    ------
    ValueError
        When the folder holds neither a model nor an adapter.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is no model folder: it has no config.json")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not str(name).endswith(UNREAD) and not any(p.startswith(".") for p in name.parts):
            found[str(name)] = path.stat()
    return found


def identity(folder: Path, files: Mapping[str, os.stat_result]) -> str:
    """What tells a model's files from what lay there before: path, names, sizes, times of change."""
    lines = (f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in files.items())
    return digest(str(folder.resolve()), *lines)


def digest(*parts: str) -> str:
    """A short name for what has many parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def copy_files(source: Path, files: Mapping[str, os.stat_result], into: Path) -> None:
    """Copy a model's files, several at a time: one stream alone does not fill the network to a parallel file system.

    Raises
    ------
    OSError
        When one cannot be copied, or has changed since `files` was made.
    """

    def copy_one(name: str) -> None:
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
        before, now = files[name], (source / name).stat()
        same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if not same or target.stat().st_size != before.st_size:
            raise OSError(
                f"{source / name} changed while it was copied: it had {before.st_size} bytes of "
                f"{time.ctime(before.st_mtime)}, and has {now.st_size} of {time.ctime(now.st_mtime)}. Who writes it?"
            )

    largest_first: Sequence[str] = sorted(files, key=lambda name: -files[name].st_size)
    with ThreadPoolExecutor(max_workers=COPYING_THREADS) as pool:
        list(pool.map(copy_one, largest_first))


def check_unchanged(folder: Path, before: str) -> None:
    """OSError when a model's files are not those any more whose `identity` is `before`."""
    if identity(folder, model_files(folder)) != before:
        raise OSError(f"files in {folder} changed while they were read: a run's models must stay as they are")


def weights_bytes(base: Path, files: Mapping[str, os.stat_result], dtype: str) -> int:
    """Bytes of all weights of a model in a number type."""
    numbers = 0
    for name in files:
        if name.endswith(".safetensors"):
            with safe_open(str(base / name), framework="np") as weights:
                numbers += sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return numbers * (4 if dtype == "float32" else 2)
