"""Reading one picture the same way in every phase: upright, RGB, whatever the file holds."""

from __future__ import annotations

from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Endings, in lower case, of the files that count as pictures."""


# What Pillow raises for broken files; SyntaxError for some PNG and TIFF.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """A file that should be a picture and cannot be decoded; the message names it."""


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as a picture. Hidden ones never do (`._photo.jpg`, half-written files)."""
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def load_image(path: Path) -> Image.Image:
    """Decode a picture as people see it.

    EXIF rotation is applied, transparency lies on white, palettes, grey, CMYK and 16-bit files become 8-bit RGB, and
    of an animation the first frame counts. The size is left alone: the model's processor resizes within its pixel
    limits.

    Parameters
    ----------
    path : pathlib.Path
        The file.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, fully decoded, with no open file behind it.

    Raises
    ------
    UnreadableImage
        If the file is missing, truncated, no picture, or larger than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(path) as opened:
            return as_seen(opened)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def as_seen(opened: Image.Image) -> Image.Image:
    """What `load_image` makes of an opened picture: a new one, decoded, upright, mode RGB."""
    return _rgb(ImageOps.exif_transpose(opened))


def check_header(path: Path) -> None:
    """Look at the first bytes of a picture only; raises UnreadableImage if they are not those of one."""
    try:
        with Image.open(path):
            pass
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as `load_image` would give it, from the file's header alone.

    Of a PNG that names its rotation behind its pixels, which is legal and rare, it is the size as stored.

    Raises
    ------
    UnreadableImage
        If the first bytes are not those of a picture.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            # Not the format's own method: that of PNGs decodes the pixels, to look for a rotation behind them.
            turned = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            lies = turned and opened.format != "TIFF"  # of which Pillow gives the size as seen
            return (height, width) if lies else (width, height)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UnreadableImage:
    reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else str(error)
    return UnreadableImage(
        f"{path} cannot be read: {reason}. Replace or remove it, or set data.unreadable_image=skip to leave such "
        "files out."
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")  # 65535 -> 255
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
