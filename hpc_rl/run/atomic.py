"""Files that are either whole or absent, on shared file systems, whoever dies when.

Trade-offs accepted: a writer killed between its temporary file and the rename leaves a `.tmp-*` file behind (harmless,
never read); a write that is to last costs two fsyncs (file and folder), so these calls are for small files that matter,
not for data. Modes follow the umask, so a group that may read the folder may read the files; `private=True` makes a
0600 file.
Exclusive creation uses link(2), which is atomic on NFS where O_EXCL historically was not (open(2), "O_EXCL").
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


class CorruptFile(ValueError):
    """A file of the workspace that cannot be read as what it should be; the message names it."""


def _write_temporary(path: Path, data: bytes, mode: int) -> Path:
    temporary = path.parent / f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(temporary, flags, mode)
    except FileNotFoundError:  # asked for only now: most folders are there, and looking is a request to their server
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def fsync_folder(folder: Path) -> None:
    """Make renames and links in `folder` survive a crash of its server."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` by `data` in one step: readers see the old content or the new, never a part."""
    _replace(path, data, 0o600 if private else 0o666)


def _replace(path: Path, data: bytes, mode: int, lasting: bool = True) -> None:
    temporary = _write_temporary(path, data, mode)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if lasting:
        fsync_folder(path.parent)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode(), private=private)


def to_json(value: Any) -> str:
    """JSON as people read it: indented, in the order given, with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any, *, private: bool = False, closed: bool = False, lasting: bool = True) -> None:
    """`write_text` of `to_json(value)`.

    With `closed` nobody else may write to the file, whatever the umask. What is not `lasting` may be the old content
    again after a crash of the server, which saves opening the folder.
    """
    mode = 0o600 if private else 0o644 if closed else 0o666
    _replace(path, to_json(value).encode(), mode, lasting)


def create_exclusive(path: Path, data: bytes | str, *, private: bool = False, folder: int | None = None) -> bool:
    """Create `path` with `data` unless it exists. Of any number of callers on any hosts exactly one gets True.

    The name appears with its whole content (link of a finished file), so a reader never sees it empty. `folder` is a
    descriptor of its folder where the caller has it open, which saves opening it.
    """
    temporary = _write_temporary(path, data.encode() if isinstance(data, str) else data, 0o600 if private else 0o666)
    try:
        os.link(temporary, path)
    except FileExistsError:
        # An NFS client may retry a link that succeeded and report EEXIST (link(2), "BUGS"). Which file it is tells; the
        # number of links, which that page recommends, may be an old one from the client's cache.
        try:
            return os.path.samestat(os.stat(temporary), os.stat(path))
        except FileNotFoundError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    if folder is None:
        fsync_folder(path.parent)
    else:
        os.fsync(folder)
    return True


def read_json(path: Path) -> Any:
    """The JSON in `path`.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    CorruptFile
        When it is not JSON; the message names the file.
    """
    text = path.read_bytes()
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorruptFile(f"{path} is not valid JSON ({error}); {len(text)} bytes") from error
