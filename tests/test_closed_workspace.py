"""Others may read a workspace and cannot change what its jobs run, also under the umask of groups that share (002)."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_rl.cluster.entry import Spec
from hpc_rl.cluster.queries import clean_environment
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run import manifest
from hpc_rl.run.closed import DEFAULT_ACL, NotClosed, check_closed, make_closed
from hpc_rl.run.code import source_root
from hpc_rl.run.workspace import Workspace
from tests.waiting import PATIENCE_S

OTHERS = stat.S_IWGRP | stat.S_IWOTH
UMASK = 0o002


def launch(root: Path, umask: int = UMASK) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc_rl.launch", "benchmarks/noop.yaml", "--workspace", str(root)]
    command += ["--executor", "local", "--set", "run.rounds=1", "--set", "stages.sample.tasks=2"]
    command += ["--set", "stages.train.nodes=1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        command, cwd=source_root(), env=environment, umask=umask, capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a group's member launched in a folder that the group may write to."""
    root = tmp_path_factory.mktemp("group") / "run"
    root.mkdir()
    root.chmod(0o2775)
    done = launch(root)
    assert done.returncode == 0, done.stderr
    return root


def test_nothing_that_a_run_makes_can_be_written_to_by_others_and_all_can_be_read(finished: Path) -> None:
    found = [finished, *finished.rglob("*")]
    assert any(path.match("code/*/hpc_rl/launch.py") for path in found)
    assert any(path.match("attempts/*.json") for path in found)
    assert any(path.match("code/*/benchmarks/__pycache__/*.pyc") for path in found), "jobs import the snapshot"
    assert not [path for path in found if path.stat().st_mode & OTHERS]
    assert all(path.stat().st_mode & stat.S_IRGRP for path in found)
    assert finished.stat().st_mode & stat.S_ISGID, "what the group has set is left as it was"


@pytest.mark.parametrize(
    "opened",
    [".", "code", "code/*/jobs", "code/*/hpc_rl/__init__.py", "rounds/round_01", "logs", "training_config.json"],
)
def test_where_others_may_write_nothing_is_run_until_it_is_closed(finished: Path, opened: str) -> None:
    ws = Workspace(finished)
    manifest.manifest_path(ws, 1, "evaluate", 0).unlink()
    path = finished if opened == "." else next(finished.glob(opened))
    path.chmod(path.stat().st_mode | stat.S_IWGRP)
    refused = launch(finished)
    assert refused.returncode == 2
    assert f"error: others may write to {path} (mode " in refused.stderr
    assert f"chmod -R go-w {finished}" in refused.stderr
    assert not manifest.done_shards(ws, 1, "evaluate")
    subprocess.run(["chmod", "-R", "go-w", str(finished)], check=True)
    assert launch(finished).returncode == 0
    assert manifest.done_shards(ws, 1, "evaluate") == {0}


def run_entry(path: Path) -> int:
    environment = {**clean_environment(), "HPC_RL_JOB_ID": "1", "HPC_RL_RESTART": "0"}
    command = [sys.executable, "-m", "hpc_rl.cluster.entry", str(path)]
    return subprocess.run(
        command, cwd=source_root(), env=environment, umask=UMASK, capture_output=True, timeout=PATIENCE_S, check=False
    ).returncode


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """A submission whose body leaves a folder behind."""
    body = ("mkdir", str(tmp_path / "was here"))
    made = Spec("run-r01-sample-a1-abc", str(tmp_path / "run"), 1, "sample", 2, "local", body, {})
    before = os.umask(0o022)
    made.save()
    os.umask(before)
    return made


def test_a_job_runs_no_command_that_others_may_have_written(spec: Spec, tmp_path: Path) -> None:
    (attempts := spec.path.parent).chmod(0o775)
    assert run_entry(spec.path) == 126
    (end,) = end_records(spec.ws, StageId(1, "sample"))
    assert end.outcome == "error" and f"NotClosed: others may write to {attempts} (mode 0775)" in end.error
    assert not (tmp_path / "was here").exists()
    attempts.chmod(0o755)
    assert run_entry(spec.path) == 0
    assert not (tmp_path / "was here").stat().st_mode & OTHERS, "what a body makes is closed too"


def test_nor_one_that_says_it_belongs_to_a_workspace_that_is_closed(spec: Spec, tmp_path: Path) -> None:
    """Who may write to a spec could name any folder as its workspace."""
    elsewhere = replace(spec, workspace=str(tmp_path / "elsewhere"))
    elsewhere.save()
    spec.path.write_bytes(elsewhere.path.read_bytes())
    assert run_entry(spec.path) != 0
    assert not (tmp_path / "was here").exists()


def test_what_belongs_to_somebody_else_is_not_run(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    file = tmp_path / "code" / "file.py"
    file.parent.mkdir(mode=0o755)
    file.touch(mode=0o644)
    check_closed(tmp_path, [file])
    os.chown(file, 65534, 65534)
    with pytest.raises(NotClosed, match=rf"{file} belongs to user 65534, not to us \(0\)"):
        check_closed(tmp_path, [file])


def default_acl(group: int) -> bytes:
    """One that gives the owner all, the group `group`, and others nothing: acl(5), in the kernel's own format."""
    entries = ((0x01, 7), (0x04, group), (0x20, 0))  # ACL_USER_OBJ, ACL_GROUP_OBJ, ACL_OTHER
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, mode, 2**32 - 1) for tag, mode in entries)


def test_a_default_acl_does_not_open_what_is_made_in_a_new_workspace(tmp_path: Path) -> None:
    try:
        os.setxattr(tmp_path, DEFAULT_ACL, default_acl(group=7))
    except OSError as error:
        pytest.skip(f"this file system has no ACLs ({error})")
    root = tmp_path / "run"
    done = launch(root)
    assert done.returncode == 0, done.stderr
    assert not [path for path in (root, *root.rglob("*")) if path.stat().st_mode & OTHERS]


@pytest.mark.parametrize(("mode", "content"), [(0o775, True), (0o1777, True), (0o1777, False)])
def test_a_folder_that_others_are_meant_to_write_to_is_left_as_it_is(tmp_path: Path, mode: int, content: bool) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    if content:
        (shared / "theirs").touch()
    shared.chmod(mode)
    refused = launch(shared)
    assert refused.returncode == 2
    assert f"others may write to {shared} (mode {mode:04o}), and are perhaps meant to" in refused.stderr
    assert f"--workspace {shared / 'run'}. Or, if it is: chmod go-w {shared}" in refused.stderr
    assert stat.S_IMODE(shared.stat().st_mode) == mode
    assert [path.name for path in shared.iterdir()] == (["theirs"] if content else [])
    make_closed(shared / "run")
