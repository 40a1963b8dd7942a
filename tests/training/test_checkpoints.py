"""Checkpoints that count and those that do not; what tells weights apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hpc_rl.run import atomic
from hpc_rl.training import checkpoints, export
from hpc_rl.training.checkpoints import COMPLETE, Checkpoints, untrusted, weights_hash


def made(folder: Path, token: str = "a", fingerprint: str = "f") -> Checkpoints:
    found = Checkpoints(folder, token, fingerprint)
    found.create()
    return found


def save(own: Checkpoints, step: int, seal: bool = True, keep: int = 2) -> Path:
    folder = own.own / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"x" * 100)
    (folder / checkpoints.PICKLED_ARGUMENTS).write_bytes(b"pickle")
    if seal:
        own.seal(folder, keep)
    return folder


def test_the_latest_whole_checkpoint_is_continued_whoever_made_it(tmp_path: Path) -> None:
    first, second = made(tmp_path, "a"), made(tmp_path, "b")
    save(first, 10)
    save(second, 9)
    assert second.latest() == checkpoints.Checkpoint(first.own / "checkpoint-10", 10)
    assert not (first.own / "checkpoint-10" / checkpoints.PICKLED_ARGUMENTS).exists()


def test_one_that_was_killed_while_saving_is_ignored(tmp_path: Path) -> None:
    own = made(tmp_path)
    whole = save(own, 10)
    save(own, 20, seal=False)
    found = own.latest()
    assert found is not None and found.folder == whole


@pytest.mark.parametrize("damage", ["shorter", "gone", "marker"])
def test_a_damaged_one_is_ignored(tmp_path: Path, damage: str) -> None:
    own = made(tmp_path)
    folder = save(own, 10)
    if damage == "shorter":
        (folder / "optimizer.pt").write_bytes(b"x")
    elif damage == "gone":
        (folder / "optimizer.pt").unlink()
    else:
        (folder / COMPLETE).write_text("{")
    assert own.latest() is None


def test_one_of_other_samples_or_settings_is_ignored_and_not_counted(tmp_path: Path) -> None:
    for step in (50, 60):
        save(made(tmp_path, "old", "other"), step)
    own = made(tmp_path, "new")
    assert own.latest() is None
    mine = save(own, 10)
    found = own.latest()
    assert found is not None and found.folder == mine


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    own = made(tmp_path)
    for step in (2, 4, 6):
        save(own, step, keep=2)
    assert sorted(path.name for path in own.own.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    own.remove()
    assert not tmp_path.exists()


def test_pickles_that_others_may_have_written_are_not_read(tmp_path: Path) -> None:
    own = made(tmp_path)
    folder = save(own, 10)
    assert untrusted(folder) is None
    own.own.chmod(0o770)
    assert "others may write" in (untrusted(folder) or "") and own.latest() is None
    own.create()
    assert own.latest() is not None, "a folder is made private again"
    (folder / "link.pt").symlink_to("/etc/passwd")
    assert "is a link" in (untrusted(folder) or "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_pickles_of_another_user_are_not_read(tmp_path: Path) -> None:
    own = made(tmp_path)
    folder = save(own, 10)
    os.chown(folder / "optimizer.pt", 12345, -1)
    assert "belongs to user 12345" in (untrusted(folder) or "") and own.latest() is None


def test_weights_have_one_hash_wherever_they_lie(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        save_file({"w": torch.full((4,), float(number // 2))}, folder / "model.safetensors")
        (folder / "config.json").write_text(str(number))
    one, same, other = (weights_hash(folder) for folder in folders)
    assert one == same != other
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        weights_hash(tmp_path)


def test_a_folder_of_a_killed_attempt_gives_way(tmp_path: Path) -> None:
    target = tmp_path / "round_01"
    for name in ("round_01", ".tmp-round_01-dead", ".tmp-round_02-alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    export.remove_leftovers(target)
    folder = tmp_path / ".tmp-round_01-mine"
    folder.mkdir()
    (folder / "new").touch()
    export.put_in_place(folder, target, "mine")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-round_02-alive", "round_01"]


def test_weights_that_are_no_numbers_get_no_folder_of_their_own(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(export.BadExport, match="diverged: 1 tensors are not finite, b among them"):
        export.write(None, None, state, tmp_path / "round_01", "t", "float32")
    assert not (tmp_path / "round_01").exists()


def test_the_marker_names_what_was_there(tmp_path: Path) -> None:
    folder = save(made(tmp_path), 10)
    marker = atomic.read_json(folder / COMPLETE)
    assert marker["step"] == 10 and marker["files_bytes"] == {"optimizer.pt": 100}
