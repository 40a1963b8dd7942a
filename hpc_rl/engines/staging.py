"""Models on a node's own disk: one copy for all processes of the node, whole or absent, whoever dies when.

    folder = node_folder(sample.stage_to, os.environ)
    with Staging(folder).model(base) as copy: …    # copy.path; nobody removes it meanwhile

A copy is made beside its place and renamed. Who makes one, or removes one, holds the folder's lock; who uses one holds
a shared lock on it. Both are the kernel's (`node_disk.FileLock`), so a process that dies leaves no lock behind, and
what it had begun to write is removed by the next. When room is needed the copies that were not used for longest go,
never one in use. A copy counts only in the boot of the machine in which it was made: after a crash of the node files
may have their size and not their content.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.engines import node_copies as copies
from hpc_rl.engines.model_files import check_unchanged, copy_files, digest, identity, model_files, weights_bytes
from hpc_rl.engines.node_disk import NETWORK, FileLock, file_system_of
from hpc_rl.run.private import make_private

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
SPARE_BYTES = 2**20
UNUSED_FOR_S = 7 * 86_400
"""Copies that nobody used for so long are removed whenever something is staged."""
POLL_S, SAY_EVERY_S = 0.2, 30.0


class NoRoom(ValueError):
    """There is no room on the node's disk for a model; the message has the numbers and the ways out."""


@dataclass
class Staged:
    """A model on the node's own disk, in use until `close`, or until the process ends.

    Attributes
    ----------
    path
        The model folder.
    how
        `found`, or `made` by this process.
    """

    path: Path
    how: str
    _lock: FileLock

    def close(self) -> None:
        """It may be removed when others need room."""
        self._lock.drop()

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Staging:
    """The copies in a folder on a node's own disk.

    Parameters
    ----------
    folder
        Of this user alone (`node_disk.node_folder`).
    free_bytes
        How much may still be written there; None = what the file system says.
    """

    def __init__(self, folder: Path, free_bytes: Callable[[Path], int] | None = None) -> None:
        self.folder = folder
        self._free_bytes = free_bytes or _free_bytes
        self._host = socket.gethostname()
        self.file_system = file_system_of(folder)
        if self.file_system in NETWORK:
            log.warning(
                "stage_to: %s is on %s, a file system over the network, not on this node's own disk: copies cost what "
                "they should save",
                folder,
                self.file_system,
            )
            self.folder = folder / self._host  # a copy counts in one boot of one machine
            make_private(self.folder)

    def model(self, source: Path, *, of_a_round: bool = False) -> Staged:
        """A copy of a model folder, without the files that are never read (`model_files.UNREAD`).

        Parameters
        ----------
        of_a_round
            The folders beside it are the same model after other rounds: their copies are removed when nobody uses them.

        Raises
        ------
        NoRoom
            When there is too little room, even without all copies that nobody uses. Nothing was copied then.
        """
        files = model_files(source)
        needed = _on_disk(status.st_size for status in files.values())
        name, series = _plain(source.name), None
        if of_a_round:
            around = source.absolute().parent
            name = series = f"{_plain(around.name)}-trained-{digest(str(around))[:8]}"
        name += f"-{identity(source, files)}"
        return self._obtain(name, str(source), needed, lambda into: copy_files(source, files, into), series)

    def merged(self, base: Path, adapter: Path, dtype: str) -> Staged:
        """A model folder with a LoRA adapter merged in (`hpc_rl.engines.merging`).

        The merger of an earlier adapter from the same place, a round before, is removed when nobody uses it.
        """
        from hpc_rl.engines.merging import merge_adapter  # torch, for those who merge

        files, of_adapter = model_files(base), model_files(adapter)
        ids = {base: identity(base, files), adapter: identity(adapter, of_adapter)}
        series = f"{_plain(base.name)}-merged-{digest(str(base), str(adapter.parent), dtype)[:8]}"
        rest = (status.st_size for name, status in files.items() if not name.endswith(".safetensors"))
        needed = _on_disk([*rest, weights_bytes(base, files, dtype)])
        what = f"{base} with {adapter} merged in"

        def merge(into: Path) -> None:
            merge_adapter(base, adapter, dtype, into)
            for folder, before in ids.items():
                check_unchanged(folder, before)

        return self._obtain(f"{series}-{digest(*ids.values(), dtype)}", what, needed, merge, series)

    def remove(self, copy: Staged) -> None:
        """Give a copy back and remove it, unless others use it: the last of them does that.

        While another process writes here it stays, for who uses it next, or until it is old.
        """
        copy.close()
        turn = FileLock(self.folder / "turn.lock")
        if turn.take(alone=True):
            try:
                if copy.path.is_dir():
                    copies.remove_unused(copy.path, "nobody uses it any more")
            finally:
                turn.drop()

    def _obtain(
        self, name: str, what: str, needed_bytes: int, make: Callable[[Path], object], series: str | None = None
    ) -> Staged:
        path, lock = self.folder / name, copies.lock_of(self.folder / name)
        if lock.take(alone=False) and copies.is_whole(path):
            lock.touch()
            return Staged(path, "found", lock)
        lock.drop()
        with self._turn(what):
            self._tidy(keep=name)
            how = "found"
            if not copies.is_whole(path):
                if path.exists():  # damaged, or of an earlier boot; those who still read it keep their files
                    log.info("%s is not whole any more; it is made again", path)
                    copies.remove(path)
                self._make_room(what, needed_bytes, keep=name)
                self._make(path, what, make)
                how = "made"
            taken = lock.take(alone=False)
            assert taken, "copies are removed only by who has the turn"
            lock.touch()
            if series is not None:
                for other in copies.all_in(self.folder):
                    if other.name.startswith(f"{series}-") and other.name != name:
                        copies.remove_unused(other, "a later round's replaces it")
        return Staged(path, how, lock)

    @contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        """The right to write here: of one process at a time; the others wait, and say so now and then."""
        lock, started, said = FileLock(self.folder / "turn.lock"), time.monotonic(), -SAY_EVERY_S
        while not lock.take(alone=True):
            waited = time.monotonic() - started
            if waited - said >= SAY_EVERY_S:
                said = waited
                written = sum(copies.bytes_below(path) for path in self.folder.glob(".tmp-*"))
                log.info(
                    "%s: waiting for another process of this node that writes to %s (%.1f GiB so far, waited %.0f s)",
                    what, self.folder, written / 2**30, waited,
                )  # fmt: skip
            time.sleep(POLL_S)
        try:
            yield
        finally:
            lock.drop()

    def _tidy(self, keep: str) -> None:
        """Remove what processes that were killed had begun, and what nobody has used for long."""
        for remains in self.folder.glob(".tmp-*"):
            log.info("removing %s, which a process left behind that was killed", remains)
            try:
                shutil.rmtree(remains)
            except OSError as error:
                log.warning("%s cannot be removed, and takes room until somebody does: %s", remains, error)
        for copy in copies.all_in(self.folder):
            if copy.name != keep and time.time() - copies.last_used(copy) > UNUSED_FOR_S:
                copies.remove_unused(copy, f"nobody used it for {UNUSED_FOR_S // 86_400} days")

    def _make_room(self, what: str, needed_bytes: int, keep: str) -> None:
        """Remove copies that nobody uses until there is room; none if all of them would not be enough."""
        others = [copy for copy in copies.all_in(self.folder) if copy.name != keep and not copies.is_used(copy)]
        free = self._free_bytes(self.folder)
        could_be_free = free + sum(copies.bytes_below(copy) for copy in others)
        if could_be_free >= needed_bytes:
            for copy in others:
                if free >= needed_bytes:
                    break
                copies.remove_unused(copy, f"room is needed for {what}")
                free = self._free_bytes(self.folder)
        if free < needed_bytes:
            raise NoRoom(
                f"{what} needs {_said(needed_bytes)} in {self.folder} on {self._host}; {_said(free)} are free there, "
                f"{_said(could_be_free)} without the copies that nobody uses. Set stage_to to a folder with more room, "
                "or to null to load it from where it lies"
            )

    def _make(self, path: Path, what: str, make: Callable[[Path], object]) -> None:
        started = time.monotonic()
        temporary = self.folder / f".tmp-{path.name}-{secrets.token_hex(4)}"
        temporary.mkdir(mode=0o700)
        try:
            make(temporary)
            size = copies.mark_whole(temporary, what)
            temporary.rename(path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(f"{what}: {self.folder} on {self._host} filled up meanwhile: {error}") from error
            raise
        took_s = time.monotonic() - started
        log.info(
            "%s is on %s now: %s, %.2f GiB in %.1f s (%.2f GiB/s)",
            what, self._host, path, size / 2**30, took_s, size / 2**30 / max(took_s, 1e-3),
        )  # fmt: skip


def _on_disk(sizes: Iterable[int]) -> int:
    return SPARE_BYTES + sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name).lstrip(".")[:80] or "model"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _said(size: int) -> str:
    return f"{size} bytes ({size / 2**30:.1f} GiB)"
