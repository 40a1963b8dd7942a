"""What an image may cost and what it may do: bombs, lies, damage and changes are errors of their item, and no more."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.data.images import load_image
from hpc_rl.services.images import FORMATS, ImageRefused, ImageRoots, InlineImage


def roots(*folders: Path, **options: Any) -> ImageRoots:
    return ImageRoots(folders, ListenerServiceConfig(**options))


def decode(data: bytes, **options: Any) -> Image.Image:
    with roots(**options).open(InlineImage(base64.b64encode(data).decode())) as file:
        return file.decode()


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageRefused) as refused:
        decode(data, **options)
    return str(refused.value)


def drawn(kind: str, size: tuple[int, int] = (40, 24), color: Any = (10, 200, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def pattern(size: tuple[int, int] = (40, 24)) -> Image.Image:
    image = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(180)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("PNG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),  # turned
        ("WEBP", {"lossless": True}),
        ("WEBP", {"save_all": True, "append_images": [Image.new("RGB", (40, 24), "blue")]}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"save_all": True, "append_images": [Image.new("RGB", (90, 90), "blue")]}),
    ],
)
def test_an_image_has_the_same_pixels_in_a_service_as_everywhere(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "image"
    pattern().save(path, kind, **options)
    expected = load_image(path)
    with roots(tmp_path).open("image") as file:
        by_path = file.decode()
    for found in (by_path, decode(path.read_bytes())):
        assert (found.mode, found.size, found.tobytes()) == (expected.mode, expected.size, expected.tobytes())


def png(width: int, height: int, rows: bytes, **chunks: bytes) -> bytes:
    """A grey PNG that claims this size and holds these (packed) rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zeros, deflated without being made."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(count >> 20)) + packer.flush()


def tiff(width: int, height: int, tile: tuple[int, int], data: bytes) -> bytes:
    """A grey, deflated TIFF of one tile."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, tile[0]), (323, 4, tile[1]), (324, 4, 8), (325, 4, len(data))]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + packed + bytes(4)


def webp(width: int, height: int) -> bytes:
    """An animation whose canvas claims this size; its one frame has 8 × 8 pixels."""
    frame = drawn("WEBP", (8, 8), lossless=True)[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    at = bytes(6) + (7).to_bytes(3, "little") * 2
    chunks += b"ANMF" + struct.pack("<I", 16 + len(frame)) + at + b"\x64\0\0\0" + frame
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


BOMBS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png(14_000, 14_000, zeros(80 << 20)),
    "png_within_pillows_limit": lambda: png(9_000, 9_000, zeros(80 << 20)),
    "tiff": lambda: tiff(10_000, 10_000, (10_000, 10_000), zeros(80 << 20)),
    "tiff_with_a_tile_larger_than_itself": lambda: tiff(16, 16, (40_000, 40_000), zeros(80 << 20)),
    "webp": lambda: webp(13_000, 13_000),
    "webp_beyond_pillows_limit": lambda: webp(16_000, 16_000),
    "bmp": lambda: drawn("BMP", (8, 8))[:18] + struct.pack("<ii", 30_000, 30_000) + drawn("BMP", (8, 8))[26:],
    "jpeg": lambda: drawn("JPEG", (16, 16)).replace(b"\x08\0\x10\0\x10", b"\x08\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_for_what_their_headers_claim_before_they_cost_anything(bomb: str) -> None:
    """Judged in a process of its own that may use little more memory than Python and Pillow themselves."""
    code = (
        "import base64, resource, sys\n"
        "from hpc_rl.config.services import ListenerServiceConfig\n"
        "from hpc_rl.services.images import ImageRefused, ImageRoots, InlineImage\n"
        "source = InlineImage(base64.b64encode(sys.stdin.buffer.read()).decode())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    with ImageRoots([], ListenerServiceConfig()).open(source) as file: file.decode()\n"
        "except ImageRefused as refused: print(refused)\n"
        "used_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert used_kib < 60 * 1024, used_kib\n"
    )
    data = BOMBS[bomb]()
    assert len(data) < 1_000_000
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=data, capture_output=True, check=False)
    assert (said.returncode, said.stdout[:29]) == (0, b"the image has too many pixels"), said


def test_a_header_that_promises_less_than_the_file_holds_is_believed() -> None:
    assert decode(png(8, 8, zeros(100 << 20))).size == (8, 8)


def test_a_header_that_promises_more_than_the_file_holds_is_damage() -> None:
    assert refusal(png(2_000, 2_000, zlib.compress(bytes(1000)))) == "the image is damaged"


def test_packed_text_of_any_size_is_not_unpacked() -> None:
    text = b"Comment\0\0" + zeros(300 << 20)
    assert refusal(png(8, 8, zlib.compress(bytes(72)), zTXt=text)) in (
        "the image is damaged",
        "the file is no image of a kind that is accepted",
    )


def jpeg_of_many_passes(side: int, passes: int) -> bytes:
    """A progressive JPEG that goes over its pixels again and again, some 70 bytes each time."""
    data = drawn("JPEG", (side, side), progressive=True, quality=10)
    end, last = data.rindex(b"\xff\xd9"), data.rindex(b"\xff\xda")
    return data[:end] + data[last:end] * passes + data[end:]


def run_length_bmp(side: int, commands: int) -> bytes:
    """A BMP whose commands do nothing; Pillow follows them in Python."""
    body, at = b"\0\2\0\0" * commands, 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 2835, 2835, 256, 0)
    return b"BM" + struct.pack("<IHHI", at + len(body), 0, 0, at) + header + bytes(1024) + body


@pytest.mark.parametrize("make", [lambda: jpeg_of_many_passes(1000, 20_000), lambda: run_length_bmp(1000, 3_000_000)])
def test_what_takes_long_to_decode_is_given_up(make: Callable[[], bytes]) -> None:
    assert refusal(make(), image_timeout_s=0.2) == "the image takes longer than 0.2 s to decode"


def test_the_limits_are_those_of_the_config(tmp_path: Path) -> None:
    data = drawn("PNG", (100, 100))
    assert decode(data, max_image_pixels=10_000).size == (100, 100)
    assert "too many pixels: 10000 of at most 9999" in refusal(data, max_image_pixels=9_999)
    assert decode(data, max_image_bytes=len(data)).size == (100, 100)
    assert "larger than" in refusal(data, max_image_bytes=len(data) - 1)
    (tmp_path / "a.png").write_bytes(data)
    with (
        pytest.raises(ImageRefused, match="larger than"),
        roots(tmp_path, max_image_bytes=len(data) - 1).open("a.png"),
    ):
        pass
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageRefused, match="larger than"), roots(tmp_path).open("large.png"):
        pass


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO", "EPS", "PCX", "TGA", "PDF", "JPEG2000"])
def test_other_formats_than_the_listed_ones_are_not_even_tried(kind: str) -> None:
    assert kind not in FORMATS
    assert refusal(drawn(kind)) == "the file is no image of a kind that is accepted"


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff", b"BM"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert refusal(data)


SAMPLES = [drawn(kind, (16, 12)) for kind in FORMATS]
SAMPLES += [drawn("JPEG", progressive=True), drawn("TIFF", compression="tiff_lzw"), webp(16, 16)]
SAMPLES += [drawn("TIFF", compression="jpeg"), tiff(16, 16, (16, 16), zlib.compress(bytes(256)))]


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_an_image_or_refused(sample: bytes, flips: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(sample)
    for place, value in flips:
        data[int(place * len(data))] = value
    for damaged in (bytes(data), bytes(data[: int(kept * len(data))])):
        with contextlib.suppress(ImageRefused):
            assert decode(damaged, max_image_pixels=1_000_000).mode == "RGB"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PNG"])
def test_a_file_that_shrinks_after_it_was_opened_is_refused_and_kills_nobody(tmp_path: Path, kind: str) -> None:
    """Of a mapped file that shrinks, the part that is gone kills whoever reads it (SIGBUS)."""
    path = tmp_path / "image"
    path.write_bytes(drawn(kind, (1000, 1000)))
    with roots(tmp_path).open("image") as file:
        os.truncate(path, 100)
        with pytest.raises(ImageRefused, match="changed while it was read"):
            file.decode()


@pytest.mark.parametrize("change", ["append", "overwrite", "overwrite_in_secret"])
def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "image.bmp"
    path.write_bytes(drawn("BMP"))
    found = path.stat()
    with roots(tmp_path).open("image.bmp") as file:
        with path.open("r+b") as writer:
            writer.seek(0 if change != "append" else found.st_size)
            writer.write(drawn("BMP", color="blue"))
        if change == "overwrite_in_secret":
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        with pytest.raises(ImageRefused, match="changed while it was read"):
            file.decode()
    with roots(tmp_path).open("image.bmp") as file:
        assert file.identity.content != (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def test_a_file_that_somebody_keeps_writing_to_never_crashes_a_reader(tmp_path: Path) -> None:
    path, stop = tmp_path / "image.bmp", threading.Event()
    whole = drawn("BMP", (200, 200))
    path.write_bytes(whole)

    def write() -> None:
        while not stop.is_set():
            os.truncate(path, 60)
            path.write_bytes(whole)

    writer = threading.Thread(target=write)
    writer.start()
    outcomes = set()
    try:
        for _ in range(300):
            try:
                with roots(tmp_path).open("image.bmp") as file:
                    outcomes.add(file.decode().getpixel((199, 199)))
            except ImageRefused as refused:
                outcomes.add(str(refused))
    finally:
        stop.set()
        writer.join()
    assert {found for found in outcomes if isinstance(found, tuple)} <= {(10, 200, 30)}


@pytest.mark.parametrize("text", ["", "====", "AAA", "A", "not base64!", "é", "data:image/png;base64,AAAA", "AA\nAA"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ImageRefused), roots().open(InlineImage(text)) as file:
        file.decode()


def test_inline_images_are_known_by_what_they_hold() -> None:
    def identity(data: bytes) -> Any:
        with roots().open(InlineImage(base64.b64encode(data).decode())) as file:
            return file.identity

    red, blue = drawn("PNG", color="red"), drawn("PNG", color="blue")
    assert identity(red) == identity(bytes(red)) != identity(blue)
