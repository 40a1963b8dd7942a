"""Folders of this user alone: for files that run as code when they are read (pickles, compiled kernels), and for /tmp.

A folder that nobody else may enter holds what this user put there and nothing else, wherever it lies; except that who
may write to the folder around it can take it away whole. Around it others must not write, or it must be sticky, as /tmp
is.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class NotPrivate(ValueError):
    """A folder that is not of this user alone; the message says which and what to do."""


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter; one that is there must be of this user, and closed to others.

    The folder around it must be there.

    Raises
    ------
    NotPrivate
        When it is a link or no folder, when it belongs to somebody else, and when others may write to it.
    """
    try:
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # whatever the default ACL says
    except FileExistsError:
        pass
    found, user = folder.lstat(), os.getuid()
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivate(f"{folder} is a link or a file, and must be a folder. Remove it")
    if found.st_uid != user:
        raise NotPrivate(f"{folder} belongs to user {found.st_uid}, not to us ({user}). Remove it, or use another one")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivate(f"others may write to {folder} (mode {stat.S_IMODE(found.st_mode):04o}). Remove it")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        folder.chmod(0o700)


def untrusted(folder: Path) -> str | None:
    """Why files that run as code must not be read from a folder: others could have written them. None if they may be.

    All that lies in it must belong to this user and be no link, and to the folder around it no one else may write.
    """
    user = os.getuid()
    for path in (folder.parent, folder, *folder.rglob("*")):
        status = path.lstat()
        if status.st_uid != user:
            return f"{path} belongs to user {status.st_uid}, not to us ({user}): it could run their code"
        if stat.S_ISLNK(status.st_mode):
            return f"{path} is a link"
    if folder.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder.parent}: what lies there could run their code. Remove it, or chmod go-w"
    return None
