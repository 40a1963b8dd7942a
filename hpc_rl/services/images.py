"""Images that a client names or sends: beneath the image roots only, regular files only, of bounded size and cost.

A path is walked folder by folder from `/` with the parent's descriptor in hand, and no symbolic link is followed on the
way, so a link that is put there while we look cannot lead out of the root (openat(2), O_NOFOLLOW). The file is read
whole from the descriptor that was checked, and decoded from memory: Pillow and libtiff map files, and a mapped file
that shrinks kills the process. No message repeats a path. A hard link or a mount beneath a root counts as beneath it.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from hpc_rl.config.services import ImageServiceConfig
from hpc_rl.data.images import as_seen

MAX_PATH_CHARACTERS = 4096
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What is decoded. Pillow knows more, some of it by running other programs (EPS)."""

BLOCK_BYTES = 4096
REFUSALS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV}
    | {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
)
"""Errors that say something of the path: no such file, a link, not ours to read, a socket. All others may pass."""


class ImageRefused(ValueError):
    """An image that is not opened or cannot be decoded; the message says why, without the path."""


@dataclass(frozen=True)
class InlineImage:
    """An image that came with the request: its file in base64 (RFC 4648, section 4), not decoded yet."""

    base64: str


ImageSource = str | InlineImage
"""A path as a client writes it, or the image itself."""


def name_of(source: ImageSource) -> str:
    """The path; of an inline image the SHA-256 of what was sent."""
    return source if isinstance(source, str) else hashlib.sha256(source.base64.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Which content an image had when it was opened; another file, or a changed one, has another identity.

    Attributes
    ----------
    content
        Of a file: device, inode, size, and when content and inode changed; of an inline image: its SHA-256.
    """

    content: tuple[int, ...] | str

    @classmethod
    def of_file(cls, found: os.stat_result) -> Identity:
        """By what the file system says about it."""
        return cls((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))

    @classmethod
    def of_bytes(cls, data: bytes) -> Identity:
        """By what it holds."""
        return cls(hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes
    ----------
    max_bytes
        Of its file.
    max_pixels
        Before it is scaled; read from the header, before anything is decoded.
    timeout_s
        For decoding. Looked at between blocks of 4 KiB: a progressive JPEG may have any number of passes over the whole
        image. TIFF and WEBP are decoded in one go, at a cost that pixels and bytes bound.
    """

    max_bytes: int
    max_pixels: int
    timeout_s: float

    @classmethod
    def of(cls, options: ImageServiceConfig) -> Limits:
        """Those of a service."""
        return cls(options.max_image_bytes, options.max_image_pixels, options.image_timeout_s)


class _TooSlow(Exception):
    pass


class _Timed(io.BytesIO):
    """A file in memory that cannot be read any more when its thread has worked for so long since it was opened.

    How long a thread waits for its turn is no fault of the image: a busy node must not cost a sample its score.
    """

    def __init__(self, data: bytes, timeout_s: float) -> None:
        super().__init__(data)
        self._deadline = time.thread_time() + timeout_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._deadline:
            raise _TooSlow
        return super().read(size)


@dataclass(frozen=True)
class OpenImage:
    """An image that is open: `read` gives its file's content."""

    identity: Identity
    read: Callable[[], bytes]
    limits: Limits

    def decode(self) -> Image.Image:
        """The image as every phase of a run sees it (`hpc_rl.data.images.load_image`), shape (H, W, 3).

        Raises
        ------
        ImageRefused
            For what is no image of `FORMATS`, exceeds the limits, is damaged, or changes while it is read.
        """
        data = self.read()
        try:
            with Image.open(_Timed(data, self.limits.timeout_s), formats=FORMATS) as opened:
                self._check_size(opened)
                opened.decodermaxblock = BLOCK_BYTES
                return as_seen(opened)
        except (ImageRefused, MemoryError):
            raise
        except UnidentifiedImageError as error:
            raise ImageRefused("the file is no image of a kind that is accepted") from error
        except Image.DecompressionBombError as error:
            raise ImageRefused("the image has too many pixels") from error
        except _TooSlow as error:
            raise ImageRefused(f"the image takes longer than {self.limits.timeout_s:g} s to decode") from error
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise ImageRefused("the image is damaged") from error

    def _check_size(self, opened: Image.Image) -> None:
        pixels = opened.width * opened.height
        if isinstance(opened, TiffImageFile):  # a tile may be larger than its image, and is decoded whole
            pixels = max(pixels, int(opened.tag_v2.get(TILEWIDTH, 0)) * int(opened.tag_v2.get(TILELENGTH, 0)))
        if pixels > self.limits.max_pixels:
            raise ImageRefused(f"the image has too many pixels: {pixels} of at most {self.limits.max_pixels}")


class ImageRoots:
    """The folders beneath which images may be opened, and what an image may cost.

    Parameters
    ----------
    roots
        Folders; they may be reached through links themselves, which are followed here and never again. A relative path
        is looked up beneath each in turn.
    options
        The limits.
    """

    def __init__(self, roots: Sequence[Path], options: ImageServiceConfig) -> None:
        self._roots = [(Path(root).absolute(), Path(root).resolve()) for root in roots]
        self._limits = Limits.of(options)

    @contextmanager
    def open(self, source: ImageSource) -> Iterator[OpenImage]:
        """Open the image that a client means.

        Parameters
        ----------
        source
            A path, relative to a root, or absolute and beginning with a root's; or an image that came along.

        Raises
        ------
        ImageRefused
            When the path leads out of the roots, over a link, to something that is not a regular file, or to nothing;
            when the file is too large; when an inline image is no base64.
        OSError
            When the file system fails, or no more files can be open: it says nothing of the image.
        """
        if isinstance(source, InlineImage):
            data = self._decode_base64(source.base64)
            yield OpenImage(Identity.of_bytes(data), lambda: data, self._limits)
            return
        descriptor = self._find(source)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ImageRefused("not a regular file")
            self._check_bytes(found.st_size)
            identity = Identity.of_file(found)
            yield OpenImage(identity, lambda: _read_whole(descriptor, identity, found.st_size), self._limits)
        finally:
            os.close(descriptor)

    def _decode_base64(self, text: str) -> bytes:
        self._check_bytes(len(text) // 4 * 3 - 2)
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ImageRefused("the image is not base64") from error
        self._check_bytes(len(data))
        return data

    def _check_bytes(self, size: int) -> None:
        if size > self._limits.max_bytes:
            raise ImageRefused(f"the file is larger than {self._limits.max_bytes} bytes")

    def _find(self, path: str) -> int:
        reason = ImageRefused("there is no such image beneath the image roots")
        for root, parts in self._candidates(path):
            try:
                return _open_without_links((*root.parts[1:], *parts))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                reason = ImageRefused(f"cannot be opened: {os.strerror(error.errno or 0)}")
        raise reason

    def _candidates(self, path: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
        if not path or len(path) > MAX_PATH_CHARACTERS or "\0" in path or not _is_encodable(path):
            raise ImageRefused("the path is empty, too long, or holds what no path can hold")
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


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _open_without_links(parts: Sequence[str]) -> int:
    """A descriptor of `/parts…`, opened without following any link and without waiting for a FIFO's writer."""
    into = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # O_PATH: folders need be searchable only
    folder = os.open("/", into)
    try:
        for part in parts[:-1]:
            inner = os.open(part, into, dir_fd=folder)
            os.close(folder)
            folder = inner
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)


def _read_whole(descriptor: int, identity: Identity, size: int) -> bytes:
    """The file's content; never more than the `size` that was checked."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        data = file.read(size + 1)
    if len(data) != size or Identity.of_file(os.fstat(descriptor)) != identity:
        raise ImageRefused("the file changed while it was read")
    return data
