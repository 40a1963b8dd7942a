"""Copies of models on a node's own disk: one for all, whole or absent, removed only when nobody uses them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hpc_rl.engines import staging as staging_module
from hpc_rl.engines.node_copies import MARKER
from hpc_rl.engines.node_disk import FileLock, NoNodeFolder, file_system_of, node_folder
from hpc_rl.engines.staging import NoRoom, Staged, Staging

KIB = 1024
HOLDER = """
import sys, time
from pathlib import Path
from hpc_rl.engines.staging import Staging
copy = Staging(Path(sys.argv[1])).model(Path(sys.argv[2]))
print(copy.how, copy.path, flush=True)
time.sleep(float(sys.argv[3]))
"""


def make_model(folder: Path, kib: int = 64) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.arange(kib * KIB // 4, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "models" / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where copies go, as `node_folder` makes it."""
    return node_folder(str(tmp_path / "local"), {})


def start(folder: Path, model: Path, hold_s: float = 0) -> subprocess.Popen[str]:
    """Another process of the node that stages a model and uses it for a while."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(model), str(hold_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said_first(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def quota(kib: int) -> Callable[[Path], int]:
    """Room for so much in a folder, as a quota would leave it."""
    return lambda folder: kib * KIB - sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def copies(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in folder.iterdir() if path.is_dir())


def test_a_copy_has_what_is_read_and_is_found_the_next_time(model: Path, folder: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    (model / "original").mkdir()
    (model / "original" / "consolidated.pth").write_bytes(b"another")
    (model / "processor").mkdir()
    (model / "processor" / "tokenizer.json").write_text("[]")
    blob = model.parent / "blob"  # as in a hub's cache: files are links to blobs
    blob.write_text("{{ messages }}")
    (model / "chat_template.jinja").symlink_to(blob)
    with Staging(folder).model(model) as first:
        assert first.how == "made"
        found = {str(p.relative_to(first.path)): p for p in first.path.rglob("*") if p.is_file()}
        wanted = {"config.json", "model.safetensors", "processor/tokenizer.json", "chat_template.jinja", MARKER}
        assert set(found) == wanted and not any(p.is_symlink() for p in found.values())
        assert found["model.safetensors"].read_bytes() == (model / "model.safetensors").read_bytes()
        assert found["chat_template.jinja"].read_text() == "{{ messages }}"
        with Staging(folder).model(model) as second:
            assert (second.how, second.path) == ("found", first.path)


def test_a_model_that_was_changed_is_another_one(model: Path, folder: Path) -> None:
    with Staging(folder).model(model) as old:
        save_file({"weight": np.zeros(16 * KIB, dtype=np.float32)}, model / "model.safetensors")
        with Staging(folder).model(model) as new:
            assert new.how == "made" and new.path != old.path
            assert (new.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_of_many_processes_at_once_one_copies(model: Path, folder: Path) -> None:
    save_file({"weight": np.ones(8 * KIB * KIB, dtype=np.float32)}, model / "model.safetensors")
    processes = [start(folder, model) for _ in range(4)]
    said = [said_first(process) for process in processes]
    for process in processes:
        assert process.communicate()[0] == "" and process.returncode == 0
    assert sorted(how for how, _ in said) == ["found", "found", "found", "made"]
    assert len({path for _, path in said}) == 1 and copies(folder) == ["tiny"]


def test_who_waits_for_another_process_says_so(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "SAY_EVERY_S", 0.1)
    turn = folder / "turn.lock"
    code = (
        "import sys, time; from pathlib import Path; from hpc_rl.engines.node_disk import FileLock\n"
        "lock = FileLock(Path(sys.argv[1])); lock.take(alone=True); print('taken', flush=True); time.sleep(1)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(turn)], stdout=subprocess.PIPE, text=True)
    assert said_first(other) == ["taken"]
    with caplog.at_level(logging.INFO), Staging(folder).model(model) as copy:
        assert copy.how == "made"
    waits = [r.message for r in caplog.records if "waiting for another process of this node" in r.message]
    assert len(waits) >= 2 and str(model) in waits[0]
    other.communicate()


def test_what_a_killed_copier_had_begun_is_not_used_and_is_removed(model: Path, folder: Path, tmp_path: Path) -> None:
    large = make_model(tmp_path / "models" / "large")
    os.truncate(large / "model.safetensors", 4 * 2**30)  # takes no room, but seconds to copy
    copier = start(folder, large)
    while not list(folder.glob(".tmp-*/model.safetensors")):
        assert copier.poll() is None
        time.sleep(0.005)
    copier.send_signal(signal.SIGKILL)
    copier.communicate()
    assert len(list(folder.glob(".tmp-large-*"))) == 1 and copies(folder) == [".tmp-large-" + large_id(folder)]
    with Staging(folder).model(model) as copy:
        assert copy.how == "made"
    assert copies(folder) == ["tiny"]


def large_id(folder: Path) -> str:
    (remains,) = folder.glob(".tmp-large-*")
    return remains.name.split("-")[2]


def test_what_cannot_be_removed_is_said_and_does_not_stop_others(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remains = folder / ".tmp-large-0123"
    remains.touch()  # no folder: neither root nor anybody else can remove it as one
    with Staging(folder).model(model) as copy:
        assert copy.how == "made" and f"{remains} cannot be removed" in caplog.text


def test_too_little_room_is_an_error_with_the_numbers_before_anything_is_copied(folder: Path, tmp_path: Path) -> None:
    huge = make_model(tmp_path / "models" / "huge")
    os.truncate(huge / "model.safetensors", 8 * 2**40)
    with pytest.raises(NoRoom, match=r"huge needs 87960\d+ bytes \(8192\.0 GiB\) in .* \d+ bytes .* are free .* null"):
        Staging(folder).model(huge)
    assert copies(folder) == []


def test_copies_not_used_for_longest_make_room(folder: Path, tmp_path: Path) -> None:
    models = {name: make_model(tmp_path / "models" / name, 400) for name in ("a", "b", "c", "d")}
    disk = Staging(folder, quota(2200))
    for name in ("a", "b"):
        disk.model(models[name]).close()
        time.sleep(0.02)
    disk.model(models["a"]).close()  # now b is the one that was not used for longest
    assert copies(folder) == ["a", "b"]
    disk.model(models["c"]).close()
    assert copies(folder) == ["a", "c"]
    in_use = disk.model(models["a"])
    time.sleep(0.02)
    disk.model(models["c"]).close()
    disk.model(models["d"]).close()
    assert copies(folder) == ["a", "d"], "c was used last, but a is in use"
    in_use.close()


def test_what_a_living_process_uses_stays_and_a_dead_one_uses_nothing(folder: Path, tmp_path: Path) -> None:
    used, wanted = (make_model(tmp_path / "models" / name, 400) for name in ("used", "wanted"))
    other = start(folder, used, hold_s=60)
    assert said_first(other)[0] == "made"
    disk = Staging(folder, quota(1700))
    with pytest.raises(NoRoom, match="wanted needs"):
        disk.model(wanted)
    assert copies(folder) == ["used"]
    kill(other)
    disk.model(wanted).close()
    assert copies(folder) == ["wanted"]


def test_nothing_is_removed_where_that_would_not_be_enough(folder: Path, tmp_path: Path) -> None:
    disk = Staging(folder, quota(2000))
    disk.model(make_model(tmp_path / "models" / "small", 300)).close()
    with pytest.raises(NoRoom):
        disk.model(make_model(tmp_path / "models" / "larger", 2000))
    assert copies(folder) == ["small"]


def damage(copy: Path) -> None:
    os.truncate(copy / "model.safetensors", 100)


def remove_one(copy: Path) -> None:
    (copy / "config.json").unlink()


def crash(copy: Path) -> None:
    """The node has crashed and started again since."""
    marker = json.loads((copy / MARKER).read_text())
    (copy / MARKER).write_text(json.dumps({**marker, "boot": "another"}))


def cut_marker(copy: Path) -> None:
    os.truncate(copy / MARKER, 10)


@pytest.mark.parametrize("harm", [damage, remove_one, crash, cut_marker])
def test_a_copy_that_is_not_whole_is_made_again(model: Path, folder: Path, harm: Callable[[Path], None]) -> None:
    with Staging(folder).model(model) as copy:
        harm(copy.path)
    with Staging(folder).model(model) as again:
        assert again.how == "made" and again.path == copy.path
        assert (again.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    with Staging(folder).model(model) as third:
        assert third.how == "found"


def test_what_nobody_used_for_a_week_is_removed(model: Path, folder: Path, tmp_path: Path) -> None:
    Staging(folder).model(make_model(tmp_path / "models" / "old")).close()
    (lock,) = folder.glob("old-*.lock")
    long_ago = time.time() - 8 * 86_400
    os.utime(lock, (long_ago, long_ago))
    Staging(folder).model(model).close()
    assert copies(folder) == ["tiny"] and not lock.exists()


def test_a_folder_without_a_model_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/nothing is no model folder: it has no config.json"):
        Staging(folder).model(tmp_path / "nothing")


@pytest.mark.parametrize("how", ["grows", "is written anew"])
def test_a_file_that_changes_while_it_is_copied_is_an_error_and_leaves_nothing(
    model: Path, folder: Path, how: str
) -> None:
    class Changed(Staging):
        def _tidy(self, keep: str) -> None:
            super()._tidy(keep)
            with (model / "model.safetensors").open("ab" if how == "grows" else "r+b") as file:
                file.write(b"more")  # after its size was read, before it is copied

    with pytest.raises(OSError, match="changed while it was copied"):
        Changed(folder).model(model)
    assert copies(folder) == []


def test_a_network_file_system_is_said_aloud(
    model: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Staging(folder)
    assert not caplog.records
    monkeypatch.setattr(staging_module, "NETWORK", frozenset({file_system_of(folder)}))
    other = Staging(folder)
    assert f"{folder} is on {file_system_of(folder)}, a file system over the network" in caplog.text
    with other.model(model) as copy:
        assert copy.path.parent == folder / socket.gethostname(), "each node has its own, as on its own disk"


def test_the_folder_is_of_this_user_alone_and_variables_are_those_of_the_node(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path), "USER": "ann"}
    made = node_folder("$TMPDIR/${USER}_x/models", environ)
    assert made == tmp_path / "ann_x" / "models" / f"hpc_rl-{os.getuid()}"
    assert made.stat().st_mode & 0o777 == 0o700
    assert node_folder("$TMPDIR/${USER}_x/models", environ) == made


@pytest.mark.parametrize(
    ("stage_to", "why"),
    [("$NOWHERE/x", "NOWHERE is not set on"), ("local", "must begin with /"), ("/proc/x", "cannot be used")],
)
def test_a_folder_that_cannot_be_is_an_error_that_says_why(stage_to: str, why: str) -> None:
    with pytest.raises(NoNodeFolder, match=why):
        node_folder(stage_to, {})


def test_a_folder_that_others_could_exchange_or_write_to_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / f"hpc_rl-{os.getuid()}"
    mine.mkdir()
    mine.chmod(0o770)
    with pytest.raises(NoNodeFolder, match="others may write to"):
        node_folder(str(tmp_path), {})
    mine.rmdir()
    (tmp_path / "elsewhere").mkdir()
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NoNodeFolder, match="is a link or a file"):
        node_folder(str(tmp_path), {})
    mine.unlink()
    tmp_path.chmod(0o777)
    for stage_to in (tmp_path, tmp_path / "elsewhere" / "further"):
        with pytest.raises(NoNodeFolder, match="no sticky bit"):
            node_folder(str(stage_to), {})
    tmp_path.chmod(0o1777)  # like /tmp
    assert node_folder(str(tmp_path), {}) == mine


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give folders away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "hpc_rl-0"
    mine.mkdir()
    os.chown(mine, 12345, -1)
    with pytest.raises(NoNodeFolder, match="belongs to user 12345"):
        node_folder(str(tmp_path), {})


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give folders away")
def test_a_folder_whose_owner_could_rename_ours_is_refused(tmp_path: Path) -> None:
    taken_first = tmp_path / "ann"
    taken_first.mkdir()
    taken_first.chmod(0o1777)  # the sticky bit holds others back, not the owner
    os.chown(taken_first, 12345, -1)
    for stage_to in (taken_first, taken_first / "models"):
        with pytest.raises(NoNodeFolder, match=f"{taken_first} belongs to user 12345, who may rename"):
            node_folder(str(stage_to), {})


def test_folders_that_are_made_on_the_way_are_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        node_folder(str(tmp_path / "ann" / "models"), {})
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("ann", "ann/models")] == [0o755, 0o755]


def test_the_path_of_a_copy_does_not_lead_through_links(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    assert node_folder(str(tmp_path / "link" / "x"), {}) == tmp_path / "scratch" / "x" / f"hpc_rl-{os.getuid()}"


def test_a_lock_that_was_tidied_away_is_not_taken_by_those_who_had_opened_it(tmp_path: Path) -> None:
    one, other = FileLock(tmp_path / "x.lock"), FileLock(tmp_path / "x.lock")
    assert one.take(alone=True) and not other.take(alone=False) and not other.take(alone=True)
    one.path.unlink()
    assert other.take(alone=True), "another file of that name: whoever removes locks holds the turn"
    one.drop()
    assert not one.take(alone=False)
    other.drop()
    assert one.take(alone=False) and other.take(alone=False)


def test_the_kernel_says_what_a_file_system_is() -> None:
    assert file_system_of(Path("/proc/self/status")) == "proc"


def test_a_staged_model_can_be_given_back_twice(model: Path, folder: Path) -> None:
    copy: Staged = Staging(folder).model(model)
    copy.close()
    copy.close()
