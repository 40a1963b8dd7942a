"""A folder on a node's own disk: where it is, what file system that is, and locks that die with their holders.

flock(2) locks an open file, not a name: the kernel gives it back when the process ends, however it ends. On file
systems over the network it may be missing or lie, so it is for a node's own disk only.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from hpc_rl.run.private import NotPrivate, exchangeable, make_private

NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "daos", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs"}
    | {"pvfs2", "smb3", "wekafs", "fuse.ceph", "fuse.daos", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs"}
)
"""File systems that other machines serve, as /proc/self/mountinfo calls them."""

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class NoNodeFolder(ValueError):
    """`stage_to` cannot be used on this node; the message says why and what to do."""


def node_folder(stage_to: str, environ: Mapping[str, str]) -> Path:
    """Our own folder beneath `stage_to`, made if it is not there, of this user alone.

    Parameters
    ----------
    stage_to
        As in the config: variables are those of `environ`.

    Raises
    ------
    NoNodeFolder
        When a variable is not set, when the path is not absolute or cannot be made, and when others could exchange or
        read what lies there.
    """
    host = socket.gethostname()

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environ.get(name):
            raise NoNodeFolder(
                f"stage_to is {stage_to!r}, but {name} is not set on {host}. Set it in the stage's env, name a "
                "folder, or set stage_to to null"
            )
        return environ[name]

    around = Path(_VARIABLE.sub(value, stage_to)).expanduser()
    if not around.is_absolute():
        raise NoNodeFolder(f"stage_to is {stage_to!r}, which is {around} on {host}, and must begin with /")
    around = around.resolve()  # links are followed once, now
    folder = around / f"hpc_rl-{os.getuid()}"
    try:
        for missing in reversed([path for path in (around, *around.parents) if not path.exists()]):
            missing.mkdir(mode=0o755, exist_ok=True)  # with a group's umask others could write to it
        if how := exchangeable(folder):
            raise NoNodeFolder(f"others may exchange {folder} on {host}: {how}. Name a folder of your own, or close it")
        make_private(folder)
    except (OSError, NotPrivate) as error:
        raise NoNodeFolder(f"stage_to is {stage_to!r}, and {folder} on {host} cannot be used: {error}") from error
    return folder


def file_system_of(path: Path) -> str:
    """The file system that `path` lies on, as the kernel calls it (proc(5), mountinfo); '' when it does not say."""
    path = path.resolve()
    found, longest = "", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        mounted = Path(fields.split()[4].encode().decode("unicode_escape"))  # a space is written \040
        if path.is_relative_to(mounted) and len(mounted.parts) >= longest:  # of equal ones the last is on top
            found, longest = rest.split()[0], len(mounted.parts)
    return found


class FileLock:
    """A lock on a file of ours, shared by many or held by one alone. The file stays: it is the lock's name.

    Parameters
    ----------
    path
        Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def take(self, *, alone: bool) -> bool:
        """Take it if that is possible now; True when it is ours. One that is held is given back first."""
        self.drop()
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            there = os.stat(self.path, follow_symlinks=False)
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        if there.st_ino != os.fstat(file).st_ino:  # somebody tidied up, and others lock another file of this name
            os.close(file)
            return False
        self._file = file
        return True

    def drop(self) -> None:
        """Give it back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def touch(self) -> None:
        """Note on the file that it is used now."""
        os.utime(self._file)
