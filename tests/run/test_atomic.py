"""Files are whole or absent: writers are killed, several create the same name, modes follow the umask."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.run import atomic
from tests.full_disk import full_disk
from tests.waiting import PATIENCE_S, wait_for

WRITER = """
import sys
from pathlib import Path
from hpc_rl.run import atomic
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"abcdefgh":
        atomic.write_bytes(path, bytes([letter]) * 100_000)
"""

RACER = """
import sys, time
from pathlib import Path
from hpc_rl.run import atomic
folder, me, names = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for name in range(names):
    if atomic.create_exclusive(folder / f"name-{name}", me * 1000):
        print(name, flush=True)
"""


@pytest.fixture
def umask() -> Iterator[None]:
    """Gives the umask back that the test found."""
    found = os.umask(0o022)
    yield
    os.umask(found)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_reader_sees_whole_contents_only_while_writers_are_killed_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    chance = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        seen, least = set[int](), chance.randint(2, 8)

        def it_was_replaced_often(seen: set[int] = seen, least: int = least) -> bool:
            if path.exists():
                data = path.read_bytes()
                assert (len(data), len(set(data))) == (100_000, 1)
                seen.add(data[0])
            return len(seen) >= least

        wait_for(it_was_replaced_often, "several contents of the file", of=writer, pause_s=0)
        writer.kill()
        writer.wait()
        writer.stdout.close()
        if path.exists():
            data = path.read_bytes()
            assert (len(data), len(set(data))) == (100_000, 1)
    left = {entry.name for entry in tmp_path.iterdir()} - {"file"}
    assert all(name.startswith(".tmp-") for name in left), "what a killed writer leaves behind is hidden"


def test_a_failed_write_leaves_neither_a_change_nor_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        atomic.write_text(tmp_path / "folder", "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_link_whose_answer_was_lost_was_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        """As an NFS client does that got no answer; the number of links does not tell, something else made one too."""
        link(source, target)
        link(source, tmp_path / "snapshot")
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert atomic.create_exclusive(tmp_path / "file", "ours")
    monkeypatch.undo()
    assert not atomic.create_exclusive(tmp_path / "file", "another's")
    assert (tmp_path / "file").read_text() == "ours"


def test_a_full_disk_is_not_filled_with_temporary_files(tmp_path: Path) -> None:
    with full_disk():
        with pytest.raises(OSError):
            atomic.write_text(tmp_path / "file", "text")
        with pytest.raises(OSError):
            atomic.create_exclusive(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: None, mask: int, expected: int) -> None:
    os.umask(mask)
    atomic.write_text(tmp_path / "written", "text")
    atomic.create_exclusive(tmp_path / "created", "text")
    assert (mode(tmp_path / "written"), mode(tmp_path / "created")) == (expected, expected)


def test_private_files_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path, umask: None) -> None:
    os.umask(0)
    atomic.write_text(tmp_path / "written", "secret", private=True)
    atomic.create_exclusive(tmp_path / "created", "secret", private=True)
    assert (mode(tmp_path / "written"), mode(tmp_path / "created")) == (0o600, 0o600)


def test_of_eight_processes_that_create_one_name_exactly_one_wins_and_its_content_stands(tmp_path: Path) -> None:
    names = 25
    racers = {
        me: subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), me, str(names)], stdout=subprocess.PIPE, text=True
        )
        for me in "abcdefgh"
    }
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == len(racers), "all racers at the start")
    (tmp_path / "go").touch()
    said = {me: racer.communicate(timeout=PATIENCE_S)[0] for me, racer in racers.items()}
    won = {me: [int(line) for line in mine.split()] for me, mine in said.items()}
    assert sorted(name for mine in won.values() for name in mine) == list(range(names))
    for me, mine in won.items():
        assert all((tmp_path / f"name-{name}").read_text() == me * 1000 for name in mine)
    assert not list(tmp_path.glob(".tmp-*"))


def test_creating_a_name_that_is_there_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "name"
    assert atomic.create_exclusive(path, "first")
    assert not atomic.create_exclusive(path, "second")
    assert path.read_text() == "first"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"{'a': 1}"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(atomic.CorruptFile, match=r"state\.json is not valid JSON"):
        atomic.read_json(path)


def test_a_file_that_is_missing_is_missing_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.read_json(tmp_path / "state.json")


def test_json_is_written_for_people(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    atomic.write_json(path, {"b": 1, "a": "ä"})
    assert path.read_text() == '{\n  "b": 1,\n  "a": "ä"\n}\n'
    assert atomic.read_json(path) == {"b": 1, "a": "ä"}
