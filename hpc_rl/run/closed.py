"""Others may read a workspace, but nobody except its owner writes to what its jobs execute.

That is `code/`, which they import; the specs of submissions, which hold command lines; the config, which names
interpreters and set-up commands; and all folders on the way there, since who may write to a folder can exchange what
lies in it. So whatever we make is closed (`keep_closed`), even under a umask that is meant for sharing (002), and where
it is open nevertheless nothing is run (`check_closed`). What lies around the workspace has to be trusted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hpc_rl.run.private import OTHERS, trusted_users

DEFAULT_ACL = "system.posix_acl_default"
"""Extended attribute of a folder: the modes of what is made in it, instead of the umask (acl(5))."""

FOREIGN = (
    "this file system does not keep owners and modes as it should (CIFS, or NFS that maps users): choose one that does"
)


class NotClosed(ValueError):
    """Somebody else may have changed what would be run; the message names it and the way out."""


def keep_closed() -> None:
    """From now on others may not write to what this process and its children make. Reading stays as the umask says."""
    os.umask(os.umask(OTHERS) | OTHERS)


def make_closed(root: Path) -> None:
    """Make a new workspace's folder, or close the one that is there, if nothing lies in it.

    Raises
    ------
    NotClosed
        When it belongs to somebody else, and when others may write to it and it is not empty, or sticky.
    """
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    empty = not any(root.iterdir())  # before the look at its mode: another launch closes it before it puts anything in
    found = root.stat()
    ours, open_to_all = found.st_uid == os.getuid(), found.st_mode & stat.S_ISVTX
    if ours and found.st_mode & OTHERS and (open_to_all or not empty):
        raise NotClosed(
            f"others may write to {root} (mode {stat.S_IMODE(found.st_mode):04o}), and are perhaps meant to. Name a "
            f"folder for this run alone, which is made: --workspace {root / 'run'}. Or, if it is: chmod go-w {root}"
        )
    if ours and empty:
        if found.st_mode & OTHERS:
            root.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
        try:
            os.removexattr(root, DEFAULT_ACL)  # what is made in it inherits it
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
        if root.stat().st_mode & OTHERS:
            raise NotClosed(f"others may write to {root}, and chmod does not change it: {FOREIGN}")
    check_closed(root, [root])


def check_closed(root: Path, paths: Iterable[Path]) -> None:
    """Make sure that nobody else may write to these files and folders, nor to those between them and `root`.

    Raises
    ------
    NotClosed
        When somebody may, or owns one of them.
    """
    looked_at, trusted = set(), trusted_users()
    for path in paths:
        assert path.is_relative_to(root), f"{path} is not in {root}"
        around = [folder for folder in path.parents if folder.is_relative_to(root)]
        for one in (*reversed(around), path):
            if one not in looked_at:
                looked_at.add(one)
                _check_one(root, one, trusted)


def check_tree_closed(root: Path, folder: Path) -> None:
    """`check_closed` for a folder with all that lies in it; what is removed meanwhile is no matter.

    Jobs that start compile the code that they import: Python makes files beside it, and renames them.
    """
    check_closed(root, [folder])
    trusted = trusted_users()
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            _check_one(root, path, trusted)


def _check_one(root: Path, one: Path, trusted: set[int]) -> None:
    found = one.stat()
    if found.st_uid not in trusted:
        raise NotClosed(
            f"{one} belongs to user {found.st_uid}, not to us ({os.getuid()}), whose jobs would run what lies "
            f"there. Use a workspace of your own: --workspace FOLDER. If it is your own, {FOREIGN}"
        )
    if found.st_mode & OTHERS:
        raise NotClosed(
            f"others may write to {one} (mode {stat.S_IMODE(found.st_mode):04o}), and jobs would run as you "
            f"what they put there. See that nobody has changed it, then: chmod -R go-w {root} (where a default "
            f"ACL opens what is new, also: setfacl -R -k {root})"
        )
