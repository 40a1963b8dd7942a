"""Opening images that a client names: beneath the image roots only, regular files only, of bounded size.

A path is walked folder by folder with the parent's descriptor in hand, and no symbolic link is followed on the way, so
a link that is put there while we look cannot lead out of the root (openat(2), O_NOFOLLOW). No message repeats a path.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from hpc_rl.data.images import UnreadableImage, load_image

MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_PATH_CHARACTERS = 4096
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What is decoded. Pillow knows more, some of it by running other programs (EPS)."""


class ImageRefused(ValueError):
    """An image that is not opened or cannot be decoded; the message says why, without the path."""


@dataclass(frozen=True)
class Identity:
    """Which content a path stood for when it was opened; another file, or a changed one, has another identity."""

    device: int
    inode: int
    size: int
    modified_ns: int


@dataclass(frozen=True)
class OpenImage:
    """An image file that is open."""

    descriptor: int
    identity: Identity

    def decode(self) -> Image.Image:
        """The image as every phase of a run sees it (`hpc_rl.data.images.load_image`), shape (H, W, 3)."""
        path = Path(f"/proc/self/fd/{self.descriptor}")
        try:
            with Image.open(path, formats=FORMATS):
                pass
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageRefused("the file is no image of a kind that is accepted") from error
        except Image.DecompressionBombError as error:
            raise ImageRefused("the image has too many pixels") from error
        try:
            return load_image(path)
        except UnreadableImage as error:
            raise ImageRefused("the image is damaged") from error


class ImageRoots:
    """The folders beneath which images may be opened.

    Parameters
    ----------
    roots
        Folders; they may be reached through links themselves. A relative path is looked up beneath each in turn.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [(Path(root).absolute(), Path(root).resolve()) for root in roots]

    @contextmanager
    def open(self, path: str) -> Iterator[OpenImage]:
        """Open the image that a client calls `path`.

        Parameters
        ----------
        path
            Relative to a root, or an absolute path that begins with a root's.

        Raises
        ------
        ImageRefused
            When it leads out of the roots, over a link, to something that is not a regular file, or to nothing.
        """
        descriptor = self._find(path)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ImageRefused("not a regular file")
            if found.st_size > MAX_IMAGE_BYTES:
                raise ImageRefused(f"the file is larger than {MAX_IMAGE_BYTES} bytes")
            yield OpenImage(descriptor, Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
        finally:
            os.close(descriptor)

    def _find(self, path: str) -> int:
        reason = ImageRefused("there is no such image beneath the image roots")
        for root, parts in self._candidates(path):
            try:
                return _open_beneath(root, parts)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                # ELOOP or EMLINK: a link; ENXIO: a socket or a FIFO; EACCES: not ours to read
                reason = ImageRefused(f"cannot be opened: {os.strerror(error.errno or 0)}")
        raise reason

    def _candidates(self, path: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
        if not path or len(path) > MAX_PATH_CHARACTERS or "\0" in path:
            raise ImageRefused("the path is empty, too long, or holds a NUL")
        named = PurePosixPath(path)
        if ".." in named.parts:
            raise ImageRefused("the path leads out of the image roots")
        found = False
        for root, resolved in self._roots:
            if not named.is_absolute():
                relative = named
            elif (base := next((b for b in (root, resolved) if named.is_relative_to(b)), None)) is not None:
                relative = named.relative_to(base)
            else:
                continue
            found = True
            if relative.parts:
                yield resolved, relative.parts
        if not found:
            raise ImageRefused("the path leads out of the image roots")


def _open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """A descriptor of `root/parts…`, opened without following any link and without waiting for a FIFO's writer."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)
