"""One copy of a model on a node's own disk: whether it is whole, who uses it, and how it goes.

Beside the folder NAME lies NAME.lock. Who uses the copy holds that lock together with others, who removes the copy
holds it alone; the time of the lock's file says when the copy was last taken into use. A marker in the copy says which
files it has, and in which boot of the machine it was made.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from pathlib import Path

from hpc_rl.engines.node_disk import FileLock

log = logging.getLogger(__name__)

MARKER = "hpc_rl-staged.json"


def lock_of(copy: Path) -> FileLock:
    """The lock of a copy, not taken."""
    return FileLock(copy.with_name(f"{copy.name}.lock"))


def mark_whole(copy: Path, what: str) -> int:
    """Write the marker of a copy that is complete; returns its size in bytes."""
    sizes = {str(path.relative_to(copy)): path.stat().st_size for path in copy.rglob("*") if path.is_file()}
    (copy / MARKER).write_text(json.dumps({"of": what, "boot": _boot(), "files_bytes": sizes}))
    return sum(sizes.values())


def is_whole(copy: Path) -> bool:
    """True when it has all its files, and was made in this boot: after a crash files may lack their content."""
    try:
        marker = json.loads((copy / MARKER).read_text())
        sizes = {name: (copy / name).stat().st_size for name in marker["files_bytes"]}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False
    return bool(marker["boot"] == _boot() and sizes == marker["files_bytes"])


def all_in(folder: Path) -> list[Path]:
    """All copies, those first that were not used for longest."""
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=last_used)


def last_used(copy: Path) -> float:
    """When it was last taken into use, seconds since the epoch; 0 when nobody knows."""
    try:
        return copy.with_name(f"{copy.name}.lock").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def is_used(copy: Path) -> bool:
    """True while a process holds its lock."""
    lock = lock_of(copy)
    free = lock.take(alone=True)
    lock.drop()
    return not free


def remove_unused(copy: Path, why: str) -> None:
    """Remove it, unless somebody uses it."""
    lock = lock_of(copy)
    if not lock.take(alone=True):
        return
    try:
        log.info("removing %s: %s", copy, why)
        remove(copy)
        lock.path.unlink(missing_ok=True)
    finally:
        lock.drop()


def remove(copy: Path) -> None:
    """Remove it; its name is gone at once, and those who still read it keep their files."""
    going = copy.with_name(f".tmp-going-{secrets.token_hex(4)}")
    copy.rename(going)
    shutil.rmtree(going)


def bytes_below(folder: Path) -> int:
    """Bytes in a folder's files, while others may be writing there."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it is just being renamed
            continue
    return total


def _boot() -> str:
    """Which start of this machine it is (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
