"""Folders of this user alone: for files that run as code when they are read (pickles, compiled kernels), and for /tmp.

A folder that nobody else may enter holds what this user put there and nothing else, wherever it lies; except that who
may write to the folder around it can take it away whole, and who may write around that one, and so on upwards. So none
of them may be open to others, or it must be sticky, as /tmp is, and of root or us (`exchangeable`); or the one around
it is closed (`close_to_others`), where what lies further out has to be trusted anyway.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""The right to write of everybody except the owner."""


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
    if found.st_mode & OTHERS:
        raise NotPrivate(f"others may write to {folder} (mode {stat.S_IMODE(found.st_mode):04o}). Remove it")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        folder.chmod(0o700)


def exchangeable(folder: Path) -> str | None:
    """How others could put a folder of theirs in the place of this one; None if they cannot.

    Who owns a folder, or may write to it, can rename what lies in it; in a sticky one only its owner can, and root.
    """
    trusted = trusted_users()
    inner = folder.parent.resolve()
    for around in (inner, *inner.parents):
        found = around.stat()
        if found.st_uid not in trusted:
            return f"{around} belongs to user {found.st_uid}, who may rename what lies in it"
        if found.st_mode & OTHERS and not found.st_mode & stat.S_ISVTX:
            return f"they may write to {around} (mode {stat.S_IMODE(found.st_mode):04o}), and it has no sticky bit"
    return None


def trusted_users() -> set[int]:
    """Whose files and folders are as good as our own: ours, and root's."""
    return {0, os.getuid(), *_unnamed()}


def _unnamed() -> set[int]:
    """In a container that does not know all users: whom files of the others, root among them, seem to belong to.

    There the machine's root and its other users cannot be told apart.
    """
    mapped = Path("/proc/self/uid_map").read_text().split()  # user_namespaces(7)
    if mapped == ["0", "0", str(2**32 - 1)]:
        return set()
    return {int(Path("/proc/sys/kernel/overflowuid").read_text())}


def close_to_others(folder: Path) -> None:
    """Take from others the right to write to a folder: then nobody else can exchange what lies in it.

    Raises
    ------
    NotPrivate
        When it is not ours.
    """
    found, user = folder.stat(), os.getuid()
    if found.st_uid != user:
        raise NotPrivate(f"{folder} belongs to user {found.st_uid}, not to us ({user}), who may rename what lies in it")
    if found.st_mode & OTHERS:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)


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
    if folder.parent.stat().st_mode & OTHERS:
        return f"others may write to {folder.parent}: what lies there could run their code. Remove it, or chmod go-w"
    return None
