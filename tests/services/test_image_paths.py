"""What a path may reach: pictures beneath the image roots, whatever is put in their way, and nothing else."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.services.images import ImageRefused, ImageRoots

from .other_user import as_nobody, open_folder

RED = (255, 0, 0)


def roots(*folders: Path) -> ImageRoots:
    return ImageRoots(folders, ListenerServiceConfig())


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
    with pytest.raises(ImageRefused) as refused, roots(root).open(path) as file:
        file.decode()
    message = str(refused.value)
    assert path == "" or path not in message
    return message


@pytest.mark.parametrize("path", ["sub/a.png", "./sub/./a.png", "sub//a.png", "sub/a.png/", "{root}/sub/a.png"])
def test_pictures_beneath_the_root_are_opened(root: Path, path: str) -> None:
    with roots(root).open(path.format(root=root)) as file:
        assert file.decode().getpixel((0, 0)) == RED


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
        "/proc/self/root{root}/sub/a.png",
        "/proc/self/cwd/a.png",
        "//etc/passwd",
        "/{root}/sub/a.png",
        "file:///etc/passwd",
        "http://127.0.0.1/a.png",
        "sub/a.png\0.png",
        "sub/\ud800.png",
        "sub/\udc80.png",
        "",
        ".",
        "sub",
        "{root}",
        "sub/a.png/b.png",
        "sub/none.png",
        "~/a.png",
        "a" * 300,
        "a" * 5000,
        "a/" * 2040,
    ],
)
def test_paths_that_lead_elsewhere_are_refused(root: Path, path: str) -> None:
    assert refuse(root, path.format(root=root, outside=root.parent / "outside"))


def test_a_descriptor_of_the_server_is_no_way_to_a_file(root: Path) -> None:
    """`/proc/self/fd/N` is a link that needs no path to what it leads to."""
    with (root.parent / "outside" / "secret.png").open("rb") as secret:
        refuse(root, f"/proc/self/fd/{secret.fileno()}")
        refuse(Path("/proc"), f"self/fd/{secret.fileno()}")
        refuse(Path(f"/proc/{os.getpid()}"), f"fd/{secret.fileno()}")
        refuse(Path(f"/proc/{os.getpid()}"), f"root{root}/sub/a.png")
        assert "changed while" in refuse(Path("/proc"), f"{os.getpid()}/environ")  # of size 0, yet it has content


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
        with roots(link).open(path) as file:
            assert file.decode().size == (8, 8)


def test_a_root_or_its_parent_swapped_for_a_link_leads_nowhere(root: Path) -> None:
    (root.parent / "outside" / "sub").mkdir()
    Image.new("RGB", (8, 8), "blue").save(root.parent / "outside" / "sub" / "a.png")
    images = roots(root)
    root.rename(root.parent / "moved")
    root.symlink_to(root.parent / "outside")
    for path in ("sub/a.png", f"{root}/sub/a.png", "secret.png"):
        with pytest.raises(ImageRefused), images.open(path):
            pass
    root.unlink()
    (root.parent / "moved").rename(root)
    parent = root.parent
    parent.rename(parent.with_name("gone"))
    parent.symlink_to(parent.with_name("gone"))
    with pytest.raises(ImageRefused), images.open("sub/a.png"):
        pass


def test_that_no_more_files_can_be_open_is_not_the_fault_of_a_picture(root: Path) -> None:
    """It passes: who is told so asks again, and a refusal would be final."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (root / "sub" / "a.png").open("rb") as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
        try:
            with pytest.raises(OSError) as failed, roots(root).open("sub/a.png"):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed.value.errno == errno.EMFILE


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
    with roots(root).open("sub/a.png") as file:
        assert file.decode().getpixel((0, 0)) == RED  # still the one that was beneath the root
    assert swapped
    refuse(root, "sub/a.png")


def test_a_picture_swapped_while_it_is_open_is_the_one_that_was_opened(root: Path) -> None:
    with roots(root).open("sub/a.png") as file:
        (root / "sub" / "a.png").unlink()
        (root / "sub" / "a.png").symlink_to(root.parent / "outside" / "secret.png")
        with pytest.raises(ImageRefused, match="changed while"):  # its inode has lost a name
            file.decode()
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
    assert refuse(Path("/dev"), "zero") == "not a regular file"


def test_folders_on_the_way_need_be_searchable_only() -> None:
    """As homes on clusters are (mode 0711); judged as another user, for root may read everything."""
    with open_folder(0o711) as folder:
        (folder / "sub").mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "sub" / "a.png")
        (folder / "sub" / "link.png").symlink_to("a.png")
        (folder / "sub").chmod(0o711)

        def look() -> None:
            images = roots(folder)
            with images.open("sub/a.png") as file:
                assert file.decode().getpixel((0, 0)) == RED
            with pytest.raises(PermissionError):
                os.listdir(folder)
            with pytest.raises(ImageRefused), images.open("sub/link.png"):
                pass

        as_nobody(look)
