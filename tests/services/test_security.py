"""Who may ask, and what a path may reach: attacks on the listener that must all fail, and fail the same way."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from hpc_rl.services.images import ImageRefused, ImageRoots

from .conftest import Lab

GAME = {"candidate_paths": ["a/0.png"], "question": "red?"}
ROUTES = [("POST", "/score"), ("POST", "/batch_score"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere")]
ROUTES += [("POST", "/health"), ("OPTIONS", "/score")]


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_every_route_wants_the_token(lab: Lab, method: str, route: str) -> None:
    url = lab.serve().publication.endpoint.url
    wrong = ["", "Bearer", "Bearer x", f"bearer {lab.token}", f"Bearer {lab.token}x", f"Bearer  {lab.token}"]
    wrong += [f"Bearer {lab.token[:-1]}", f"Basic {lab.token}", lab.token]
    with httpx.Client(trust_env=False) as http:
        assert http.request(method, f"{url}{route}", json=GAME).status_code == 401
        for value in wrong:
            answer = http.request(method, f"{url}{route}", json=GAME, headers={"Authorization": value})
            assert answer.status_code == 401, value
            assert answer.headers["www-authenticate"] == "Bearer"
        twice = [("Authorization", f"Bearer {lab.token}"), ("Authorization", "Bearer x")]
        assert http.request(method, f"{url}{route}", json=GAME, headers=twice).status_code == 401
        good = http.request(method, f"{url}{route}", json=GAME, headers={"Authorization": f"Bearer {lab.token}"})
        assert good.status_code in (200, 404, 405, 422)


def test_health_tells_strangers_that_it_lives_and_who_it_is_and_no_more(lab: Lab) -> None:
    endpoint = lab.serve().publication.endpoint
    with httpx.Client(trust_env=False) as http:
        assert http.get(f"{endpoint.url}/health").json() == {"status": "ok", "nonce": endpoint.nonce}
        headers = {"Authorization": f"Bearer {lab.token}"}
        assert {"service", "waiting_items", "counters"} <= set(
            http.get(f"{endpoint.url}/health", headers=headers).json()
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root with one picture, beside a secret picture that is not in it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(root / "sub" / "a.png")
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "outside" / "secret.png")
    return root


def refuse(root: Path, path: str) -> str:
    with pytest.raises(ImageRefused) as refused, ImageRoots([root]).open(path) as file:
        file.decode()
    message = str(refused.value)
    assert path == "" or path not in message
    return message


@pytest.mark.parametrize("path", ["sub/a.png", "./sub/./a.png", "sub//a.png", "{root}/sub/a.png"])
def test_pictures_beneath_the_root_are_opened(root: Path, path: str) -> None:
    with ImageRoots([root]).open(path.format(root=root)) as file:
        assert file.decode().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.png",
        "sub/../../outside/secret.png",
        "sub/../sub/a.png",
        "{root}/../outside/secret.png",
        "{outside}/secret.png",
        "{root}x/a.png",
        "/etc/passwd",
        "/proc/self/environ",
        "//etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/a.png",
        "sub/a.png\0.png",
        "",
        ".",
        "sub",
        "{root}",
        "sub/a.png/b.png",
        "sub/none.png",
        "~/a.png",
        "a" * 5000,
    ],
)
def test_paths_that_lead_elsewhere_are_refused(root: Path, path: str) -> None:
    assert refuse(root, path.format(root=root, outside=root.parent / "outside"))


def test_links_are_not_followed_wherever_they_lead(root: Path) -> None:
    (root / "file.png").symlink_to(root.parent / "outside" / "secret.png")
    (root / "folder").symlink_to(root.parent / "outside")
    (root / "inside.png").symlink_to(root / "sub" / "a.png")
    (root / "self").symlink_to(root / "self")
    for path in ("file.png", "folder/secret.png", "inside.png", "self", "self/a.png"):
        refuse(root, path)


def test_the_root_itself_may_be_reached_over_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    for path in ("sub/a.png", f"{link}/sub/a.png", f"{root}/sub/a.png"):
        with ImageRoots([link]).open(path) as file:
            assert file.decode().size == (8, 8)


def test_a_folder_swapped_for_a_link_while_we_look_leads_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and opening, `sub` becomes a link to a folder outside that has a picture of the same name."""
    Image.new("RGB", (8, 8), "blue").save(root.parent / "outside" / "a.png")
    real_open, swapped = os.open, []

    def open_and_swap(name: object, *args: object, **kwargs: object) -> int:
        if name == "a.png" and not swapped:
            (root / "sub").rename(root / "moved")
            (root / "sub").symlink_to(root.parent / "outside")
            swapped.append(name)
        return real_open(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_and_swap)
    with ImageRoots([root]).open("sub/a.png") as file:
        assert file.decode().getpixel((0, 0)) == (255, 0, 0)  # still the one that was beneath the root
    assert swapped
    refuse(root, "sub/a.png")


@pytest.fixture
def unix_socket(root: Path) -> Iterator[str]:
    here = os.open(root, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"/proc/self/fd/{here}/socket.png")  # the path itself may be too long for a socket
        yield "socket.png"
    os.close(here)


def test_only_regular_files_are_read_and_nothing_is_waited_for(root: Path, unix_socket: str) -> None:
    os.mkfifo(root / "fifo.png")
    assert refuse(root, "fifo.png") == "not a regular file"
    assert refuse(root, "sub") == "not a regular file"
    refuse(root, unix_socket)
    with pytest.raises(ImageRefused, match="not a regular file"), ImageRoots([Path("/dev")]).open("zero"):
        pass


def bomb(side: int) -> bytes:
    """A small PNG that claims, and has, side × side grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (side + 1) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_large_files_and_other_formats_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "bomb.png").write_bytes(bomb(14_000))
    assert (root / "bomb.png").stat().st_size < 1_000_000
    assert refuse(root, "bomb.png") == "the image has too many pixels"
    with (root / "large.png").open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    assert "larger than" in refuse(root, "large.png")
    (root / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert refuse(root, "a.eps") == "the file is no image of a kind that is accepted"
    Image.new("RGB", (64, 64), "red").save(root / "cut.png")
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:60])
    assert refuse(root, "cut.png") == "the image is damaged"
    (root / "text.png").write_text("not an image")
    refuse(root, "text.png")


def test_over_http_attacks_are_errors_of_their_item_and_name_no_path(lab: Lab, tmp_path: Path) -> None:
    endpoint = lab.serve().publication.endpoint
    os.mkfifo(lab.pictures / "a" / "fifo.png") if not (lab.pictures / "a" / "fifo.png").exists() else None
    paths = ["../x.png", "/etc/passwd", "/proc/self/environ", "a/fifo.png", "a/\0.png", "a", str(tmp_path)]
    batch = [{"candidate_paths": [path], "question": "red?"} for path in paths]
    headers = {"Authorization": f"Bearer {lab.token}"}
    said = httpx.post(
        f"{endpoint.url}/batch_score", json={"batch": [*batch, GAME]}, headers=headers, trust_env=False, timeout=20
    ).json()["results"]
    assert [list(result) for result in said[:-1]] == [["error"]] * len(paths)
    assert not any(len(path) > 1 and path in result["error"] for path, result in zip(paths, said, strict=False))
    assert said[-1]["predicted_index"] == 0
