"""Pictures of every kind come out upright, RGB and of the right colours; broken ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_rl.data.images import UnreadableImage, check_header, is_image_name, load_image, size_of


def test_a_rotated_photo_is_turned_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20), "red")
    photo.paste("blue", (0, 0, 10, 20))  # the left edge of the stored picture
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90° clockwise to see it": the left edge becomes the top
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = load_image(tmp_path / "photo.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (0, 0, 255)
    assert upright.getpixel((10, 30)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_the_size_is_known_from_the_header_alone(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    noise = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, exif=exif)
    assert size_of(whole) == load_image(whole).size == ((120, 200) if orientation in (6, 8) else (200, 120))
    if ending in ("png", "jpg"):  # the others have their tables at the end
        cut.write_bytes(whole.read_bytes()[:4000])
        assert size_of(cut) == size_of(whole)
        with pytest.raises(UnreadableImage):
            load_image(cut)


def test_a_size_that_cannot_be_known_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    for name in ("no.png", "absent.png"):
        with pytest.raises(UnreadableImage, match=name):
            size_of(tmp_path / name)


def test_a_large_photo_keeps_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 2000), (10, 200, 30)).save(tmp_path / "large.jpg")
    large = load_image(tmp_path / "large.jpg")
    assert (large.size, large.mode) == ((3000, 2000), "RGB")


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    layer.putpixel((0, 0), (0, 0, 0, 0))
    layer.save(tmp_path / "layer.png")
    palette = layer.quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    palette.save(tmp_path / "palette.png")
    for name in ("layer.png", "palette.png"):
        picture = load_image(tmp_path / name)
        assert picture.mode == "RGB"
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("1", "png"), ("P", "png"), ("CMYK", "jpg"), ("LA", "png")])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, ending: str) -> None:
    Image.new("RGB", (16, 16), "white").convert(mode).save(tmp_path / f"picture.{ending}")
    picture = load_image(tmp_path / f"picture.{ending}")
    assert picture.mode == "RGB"
    assert min(picture.getpixel((8, 8))) >= 250  # type: ignore[type-var, arg-type]


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) in [(127, 127, 127), (128, 128, 128)]


def broken_files(folder: Path) -> list[Path]:
    whole = folder / "whole.png"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(whole)
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes(whole.read_bytes()[:3000])
    return [folder / name for name in ("text.jpg", "empty.jpg", "cut.png", "missing.png")]


def test_a_broken_file_is_named_with_the_ways_out(tmp_path: Path) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(UnreadableImage, match=rf"{path.name} .*data.unreadable_image=skip"):
            load_image(path)


def test_the_header_check_finds_what_is_no_picture(tmp_path: Path) -> None:
    text, empty, cut, missing = broken_files(tmp_path)
    for path in (text, empty, missing):
        with pytest.raises(UnreadableImage, match=path.name):
            check_header(path)
    check_header(cut)  # begins like a picture: found when it is decoded


@pytest.mark.parametrize("name", ["a.JPG", "b.jpeg", "c.PNG", "d.webp", "e.tif"])
def test_names_of_pictures(name: str) -> None:
    assert is_image_name(name)


@pytest.mark.parametrize("name", [".a.jpg", "._photo.jpg", "notes.txt", "jpg", "Thumbs.db"])
def test_names_of_other_files(name: str) -> None:
    assert not is_image_name(name)
