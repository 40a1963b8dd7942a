"""Others may read a workspace, but nobody except its owner writes to what its jobs execute.

That is `code/`, which they import; the specs of submissions, which hold command lines; the config, which names
interpreters and set-up commands; and all folders on the way there, since who may write to a folder can exchange what
lies in it. So whatever we make is closed (`keep_closed`), even under a umask that is meant for sharing (002), and where
it is open nevertheless nothing is run (`check_closed`). What lies around the workspace has to be trusted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from hpc_rl.run.private import trusted_users

OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotClosed(ValueError):
    """Somebody else may have changed what would be run; the message names it and the way out."""


def keep_closed() -> None:
    """From now on others may not write to what this process and its children make. Reading stays as the umask says."""
    os.umask(os.umask(OTHERS) | OTHERS)


def make_closed(root: Path) -> None:
    """Make a new workspace's folder, or close the one that is there.

    Raises
    ------
    NotClosed
        When it belongs to somebody else.
    """
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_mode & OTHERS and found.st_uid == os.getuid():
        root.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
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
            if one in looked_at:
                continue
            looked_at.add(one)
            found = one.stat()
            if found.st_uid not in trusted:
                raise NotClosed(
                    f"{one} belongs to user {found.st_uid}, not to us ({os.getuid()}), whose jobs would run what lies "
                    "there. Use a workspace of your own: --workspace FOLDER"
                )
            if found.st_mode & OTHERS:
                raise NotClosed(
                    f"others may write to {one} (mode {stat.S_IMODE(found.st_mode):04o}), and jobs would run as you "
                    f"what they put there. See that nobody has changed it, then: chmod -R go-w {root} (where a default "
                    f"ACL opens what is new, also: setfacl -R -k {root})"
                )
