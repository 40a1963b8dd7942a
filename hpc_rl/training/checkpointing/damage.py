"""Whether the files of a checkpoint are whole, by their structure: what a kill or a full disk leaves is shorter.

Only the ends and the headers are read, some kilobytes a file however large the model is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

LONGEST_HEADER_BYTES = 100_000_000
"""The limit of safetensors' own reader (safetensors/src/tensor.rs)."""


def damage(folder: Path, files_bytes: Mapping[str, int]) -> str | None:
    """What is wrong with the first file that is; None if all are whole.

    Parameters
    ----------
    files_bytes
        Names below `folder`, and the size that each has.
    """
    for name, size in files_bytes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size than when it was written"
        check = _CHECKS.get(path.suffix)
        try:
            if check is not None:
                check(path)
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            return f"{name} is not whole ({error})"
    return None


def _check_torch(path: Path) -> None:
    """torch.save writes a zip archive, whose table of contents comes last."""
    with zipfile.ZipFile(path) as archive:
        if not archive.namelist():
            raise ValueError("an archive without content")


def _check_safetensors(path: Path) -> None:
    """Eight bytes of length, a JSON header, and as many bytes as that says (safetensors' README, "Format")."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(LONGEST_HEADER_BYTES, size - 8):
            raise ValueError("no header")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError("tensors are missing")


def _check_json(path: Path) -> None:
    json.loads(path.read_bytes())


_CHECKS: dict[str, Callable[[Path], None]] = {
    ".pt": _check_torch, ".pth": _check_torch, ".bin": _check_torch, ".safetensors": _check_safetensors,
    ".json": _check_json,
}  # fmt: skip


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below `folder`, as this host sees them."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
