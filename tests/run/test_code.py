"""The snapshot of the code: the same content is the same folder, an edit is another one, and jobs import it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.closed import NotClosed, check_tree_closed
from hpc_rl.run.code import PACKAGES, snapshot, source_root
from hpc_rl.run.workspace import Workspace
from tests.waiting import PATIENCE_S

LAUNCH = """
import sys
from pathlib import Path
from hpc_rl.run.code import snapshot
from hpc_rl.run.workspace import Workspace
print(snapshot(Workspace(Path(sys.argv[1]))))
"""


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "run")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A package of the user's own."""
    package = tmp_path / "mine"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("ANSWER = 1\n")
    (package / "deep" / "module.py").write_text("")
    return package


def test_the_same_code_is_the_same_folder(ws: Workspace, mine: Path) -> None:
    first = snapshot(ws, [mine])
    (mine / "__pycache__").mkdir()
    (mine / "__pycache__" / "x.py").write_text("compiled")
    assert snapshot(ws, [mine]) == first
    assert [entry.name for entry in ws.code_dir.iterdir()] == [first.name]


def test_an_edit_gives_another_folder_and_leaves_the_first_as_it_was(ws: Workspace, mine: Path) -> None:
    first = snapshot(ws, [mine])
    (mine / "__init__.py").write_text("ANSWER = 2\n")
    second = snapshot(ws, [mine])
    assert first != second
    assert (first / "mine" / "__init__.py").read_text() == "ANSWER = 1\n"
    assert (second / "mine" / "__init__.py").read_text() == "ANSWER = 2\n"


def test_a_moved_or_renamed_module_is_another_content(ws: Workspace, mine: Path) -> None:
    first = snapshot(ws, [mine])
    (mine / "deep" / "module.py").rename(mine / "deep" / "other.py")
    assert snapshot(ws, [mine]) != first


def test_jobs_import_the_snapshot_and_not_the_sources(ws: Workspace, mine: Path) -> None:
    folder = snapshot(ws, [mine])
    code = "import hpc_rl.launch, jobs.advance, mine; print(hpc_rl.__file__, jobs.advance.__file__, mine.ANSWER)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(folder / "hpc_rl/__init__.py"), str(folder / "jobs/advance.py"), "1"]


def test_every_module_is_in_the_snapshot(ws: Workspace) -> None:
    folder = snapshot(ws)
    for package in PACKAGES:
        sources = {path.relative_to(source_root()) for path in (source_root() / package).rglob("*.py")}
        assert {path.relative_to(folder) for path in (folder / package).rglob("*.py")} == sources


def test_launches_at_one_moment_agree_on_one_folder(ws: Workspace) -> None:
    launches = [
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(ws.root)], cwd=source_root(), stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = {launch.communicate(timeout=PATIENCE_S)[0].strip() for launch in launches}
    assert len(answers) == 1
    assert [str(entry) for entry in ws.code_dir.iterdir()] == list(answers)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=lambda umask: f"umask-{umask:03o}")
def test_others_may_read_it_as_the_umask_says_and_never_write_to_it(ws: Workspace, mine: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = snapshot(ws, [mine])
    finally:
        os.umask(before)
    found = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (ws.code_dir, folder, *folder.rglob("*"))}
    assert found == {(True, 0o755 & ~umask), (False, 0o644 & ~umask)}


def test_a_snapshot_that_is_not_what_its_name_says_is_not_used(ws: Workspace, mine: Path) -> None:
    module = snapshot(ws, [mine]) / "mine" / "deep" / "module.py"
    module.write_text("something else\n")
    with pytest.raises(CorruptFile, match=f"{module} is not the code that its folder's name stands for: remove"):
        snapshot(ws, [mine])
    module.chmod(0o664)
    with pytest.raises(NotClosed, match=f"others may write to {module}"):
        snapshot(ws, [mine])


def test_what_jobs_compile_beside_the_code_while_it_is_looked_at_is_no_matter(ws: Workspace, mine: Path) -> None:
    code = snapshot(ws, [mine])
    cache = code / "mine" / "__pycache__"
    cache.mkdir()
    stop = threading.Event()

    def compile() -> None:  # as Python does (importlib, _write_atomic)
        while not stop.is_set():
            for number in range(50):
                (cache / f"{number}.pyc.{number}").touch()
            for number in range(50):
                (cache / f"{number}.pyc.{number}").rename(cache / f"{number}.pyc")

    thread = threading.Thread(target=compile)
    thread.start()
    try:
        for _ in range(200):
            check_tree_closed(ws.root, code)
    finally:
        stop.set()
        thread.join()
    (cache / "0.pyc").chmod(0o664)
    with pytest.raises(NotClosed, match=f"others may write to {cache}/0"):
        check_tree_closed(ws.root, code)
