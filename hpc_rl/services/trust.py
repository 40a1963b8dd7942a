"""What of a service's folder is believed: files of this user alone, in a folder that no one else writes to."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class Untrusted(ValueError):
    """A token or record that somebody else wrote, or could have; the message names the file and the way out."""


def make_folder(folder: Path) -> None:
    """Make a service's folder, writable to this user alone whatever the umask; an existing one of ours is closed."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.getuid() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        folder.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def read_own(path: Path, *, private: bool = False) -> bytes:
    """Content of a regular file that belongs to this user; with `private`, that has mode 0600. See `open_own`."""
    with open_own(path, private=private) as file:
        return file.read()


@contextmanager
def open_own(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A regular file that belongs to this user, and no one else writes to, for reading; with `private`, of mode 0600.

    Judged by the descriptor that is read, so that nothing can be exchanged in between; links are not followed, and a
    named pipe does not hold us up.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    Untrusted
        When it is anything else.
    """
    way_out = "remove it, and start again as the user whose run this is"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Untrusted(f"{path} cannot be opened as a file of this user ({error.strerror}); {way_out}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode):
            raise Untrusted(f"{path} is no regular file; {way_out}")
        if found.st_uid != os.getuid():
            raise Untrusted(f"{path} belongs to user {found.st_uid}, not to {os.getuid()}; {way_out}")
        if private and mode != 0o600:
            raise Untrusted(f"{path} has mode {mode:04o} instead of 0600, so others may know it; {way_out}")
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Untrusted(f"{path} has mode {mode:04o}, so others may have written to it; {way_out}")
        yield file
