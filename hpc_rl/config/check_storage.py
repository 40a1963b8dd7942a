"""Can every node write to the workspace? Writable is tried; shared is judged by what the kernel and the config say."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config

NODE_LOCAL_TYPES = frozenset({"tmpfs", "ramfs", "devtmpfs", "overlay", "aufs", "squashfs", "iso9660"})
"""File systems that no other node sees. A disk (ext4, xfs) is not among them: a head node may export its own by NFS."""

NODE_LOCAL_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run"))
"""Folders that each node has for itself, whatever lies beneath them."""


@dataclass(frozen=True)
class Mount:
    """One line of /proc/mounts."""

    point: Path
    type: str


def check_storage(config: Config, executor: str, mounts: Path = Path("/proc/mounts")) -> Iterator[Problem]:
    """Problems with `run.workspace`: not writable, or with executor slurm not where other nodes see it."""
    workspace = config.run.workspace
    yield from _check_writable(workspace)
    if executor == "slurm":
        yield from _check_shared(config, mounts)


def _check_writable(workspace: Path) -> Iterator[Problem]:
    field, way_out = "run.workspace", "choose another folder with --workspace"
    folder = nearest_folder(workspace)
    if not folder.is_dir():
        yield Problem(field, f"{folder} is a file, so {workspace} cannot be a folder", "a folder", way_out)
        return
    try:  # asking for permissions does not tell: root is refused by NFS, and anyone by a read-only mount or a quota
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Problem(field, f"cannot write to {folder}: {error.strerror or error}", "a writable folder", way_out)


def _check_shared(config: Config, mounts: Path) -> Iterator[Problem]:
    field, workspace, roots = "run.workspace", config.run.workspace, config.cluster.shared_roots
    real = _real(workspace)
    if roots:
        if not any(real.is_relative_to(_real(root)) for root in roots):
            shown = ", ".join(map(str, roots))
            way_out = "choose one with --workspace, or add its root to cluster.shared_roots"
            yield Problem(field, f"{workspace} is not on shared storage", f"a folder beneath {shown}", way_out)
        return
    if config.cluster.allow_local_workspace:
        return
    mount = mount_of(real, mounts)
    local_folder = next((folder for folder in NODE_LOCAL_FOLDERS if real.is_relative_to(folder)), None)
    if mount is not None and mount.type in NODE_LOCAL_TYPES:
        reason = f"it is on {mount.type} (mounted at {mount.point})"
    elif local_folder is not None and (mount is None or local_folder.is_relative_to(mount.point)):
        reason = f"{local_folder} belongs to each node alone"
    else:
        return
    way_out = (
        "choose a folder on shared storage with --workspace; if this one is shared after all, name it in "
        "cluster.shared_roots, or set cluster.allow_local_workspace=true where the cluster is one machine"
    )
    yield Problem(field, f"other nodes do not see {workspace}: {reason}", "a folder that all nodes share", way_out)


def nearest_folder(path: Path) -> Path:
    """`path`, or what exists nearest above it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _real(path: Path) -> Path:
    existing = nearest_folder(path)
    return existing.resolve() / path.relative_to(existing)


def mount_of(path: Path, mounts: Path) -> Mount | None:
    """The mount that an absolute path lies on; None where there is no list of mounts (not Linux)."""
    try:
        text = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None
    found = None
    for line in text.splitlines():
        _, point, type_, *_ = line.split(" ")
        mount = Mount(Path(_unescape(point)), type_)
        # Later lines lie over earlier ones with the same point.
        if path.is_relative_to(mount.point) and (found is None or mount.point.is_relative_to(found.point)):
            found = mount
    return found


def _unescape(text: str) -> str:
    """`/proc/mounts` writes space, tab, newline and backslash as octal numbers (getmntent(3))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
