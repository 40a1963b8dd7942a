"""Counts what a process asks of the server of its file system, with strace(1)."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

NAMES = {
    "openat": "open",
    "linkat": "link",
    "link": "link",
    "unlinkat": "unlink",
    "unlink": "unlink",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "rmdir": "rmdir",
    "stat": "stat",
    "lstat": "stat",
    "newfstatat": "stat",
    "statx": "stat",
    "access": "stat",
    "faccessat2": "stat",
    "readlink": "stat",
    "utimensat": "utime",
    "getdents64": "readdir",
    "fsync": "fsync of a folder",
}
"""System call → metadata operation."""

_CALL = re.compile(r"^(\d+\.\d+) (\w+)\((.*)")


def why_not() -> str | None:
    """Why nothing can be counted here, None when it can."""
    return None if shutil.which("strace") else "strace is not installed: run tests/slurm/install.sh"


def traced(prefix: Path) -> list[str]:
    """What to put before a command, so that each of its threads writes its calls to a file `PREFIX.NUMBER`."""
    calls = ",".join(f"?{name}" for name in NAMES)
    return [
        "strace",
        "-ff",
        "-qqq",
        "-ttt",
        "-y",
        "--seccomp-bpf",
        "-e",
        f"trace={calls}",
        "-e",
        "signal=none",
        "-o",
        f"{prefix}",
    ]


def count(prefix: Path, folder: Path, since: float = 0.0, until: float = float("inf")) -> Counter[str]:
    """The metadata operations on `folder` and what is in it, between two times (seconds since the epoch).

    Reading, writing and forcing a file's content to disk is not metadata, nor is what is asked of an open file. A
    listing counts as its open and each readdir that brought something.
    """
    found: Counter[str] = Counter()
    folders = {str(path) for path in (folder, *folder.rglob("*/"))}
    for trace in prefix.parent.glob(f"{prefix.name}.*"):
        for line in trace.read_text(errors="replace").splitlines():
            match = _CALL.match(line)
            if match is None or str(folder) not in line or not since <= float(match[1]) < until:
                continue
            if _is_metadata(match[2], match[3], folders):
                found[NAMES[match[2]]] += 1
    return found


def _is_metadata(call: str, rest: str, folders: set[str]) -> bool:
    if call == "fsync":
        return rest.partition("<")[2].partition(">")[0] in folders
    if call == "getdents64":
        return not rest.endswith("= 0")
    return not ('""' in rest and "AT_EMPTY_PATH" in rest)  # newfstatat of a descriptor is fstat
