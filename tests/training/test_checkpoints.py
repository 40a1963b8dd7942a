"""Checkpoints that count and those that do not; what tells weights apart."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_rl import config as configs
from hpc_rl.engines.weights import weights_hash
from hpc_rl.orchestrate.job import Job, Shard, load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.private import untrusted
from hpc_rl.training.checkpointing import checkpoints
from hpc_rl.training.checkpointing.checkpoints import COMPLETE, Checkpoints
from hpc_rl.training.checkpointing.damage import damage, sizes
from hpc_rl.training.errors import CheckpointFailed
from hpc_rl.training.exporting import export
from tests.waiting import PATIENCE_S


def made(folder: Path, token: str = "a", fingerprint: str = "f", keep: int = 2, ours: bool = True) -> Checkpoints:
    found = Checkpoints(folder, token, fingerprint, keep, lambda: ours)
    found.create()
    return found


def write(own: Checkpoints, step: int) -> Path:
    """A checkpoint as transformers writes it, not yet sealed."""
    folder = own.own / f"checkpoint-{step}"
    folder.mkdir()
    torch.save({"state": torch.ones(10)}, folder / "optimizer.pt")
    save_file({"w": torch.ones(3)}, folder / "adapter_model.safetensors")
    (folder / checkpoints.PICKLED_ARGUMENTS).write_bytes(b"pickle")
    (folder / "zero_to_fp32.py").write_text("import this")
    (folder / checkpoints.STATE).write_text(f'{{"global_step": {step}}}')
    return folder


def save(own: Checkpoints, step: int) -> Path:
    folder = write(own, step)
    own.seal(folder)
    return folder


def cut(path: Path, by: int = 1) -> None:
    """What a write that ran into a full disk leaves."""
    os.truncate(path, path.stat().st_size - by)


def test_the_latest_whole_checkpoint_is_continued_whoever_made_it(tmp_path: Path) -> None:
    first, second = made(tmp_path, "a"), made(tmp_path, "b")
    save(first, 10)
    save(second, 9)
    found = second.latest()
    assert found is not None and (found.folder, found.step) == (first.own / "checkpoint-10", 10)
    assert not (first.own / "checkpoint-10" / checkpoints.PICKLED_ARGUMENTS).exists()


def test_one_that_was_killed_while_saving_is_ignored_and_the_next_attempt_removes_it(tmp_path: Path) -> None:
    own = made(tmp_path)
    whole, half = save(own, 10), write(own, 20)
    (own.own / "scores-abc").mkdir()
    found = own.latest()
    assert found is not None and found.folder == whole
    after = made(tmp_path, "b")
    assert not half.exists(), "it may be what fills the disk"
    found = after.latest()
    assert found is not None and found.folder == whole and (own.own / "scores-abc").exists()


@pytest.mark.parametrize("what", ["shorter", "gone", "marker", "same size", "another step"])
def test_a_damaged_one_is_ignored(tmp_path: Path, what: str) -> None:
    own = made(tmp_path)
    folder = save(own, 10)
    if what == "shorter":
        cut(folder / "optimizer.pt")
    elif what == "gone":
        (folder / "optimizer.pt").unlink()
    elif what == "marker":
        (folder / COMPLETE).write_text("{")
    elif what == "same size":  # blocks that never reached a disk come back as zeros
        (folder / "optimizer.pt").write_bytes(b"\0" * (folder / "optimizer.pt").stat().st_size)
    else:
        (folder / checkpoints.STATE).write_text('{"global_step": 11}')
    assert own.latest() is None


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", checkpoints.STATE])
def test_one_that_cannot_be_read_back_does_not_count_and_those_before_it_stay(tmp_path: Path, name: str) -> None:
    own = made(tmp_path, keep=1)
    before, folder = save(own, 10), write(own, 20)
    cut(folder / name, 2)
    with pytest.raises(CheckpointFailed, match=f"checkpoint-20 was written and cannot be read back: {name} is not who"):
        own.seal(folder)
    found = own.latest()
    assert found is not None and found.folder == before
    assert not (folder / COMPLETE).exists()


def test_files_of_other_hosts_are_waited_for_and_missed_by_name(tmp_path: Path) -> None:
    own = made(tmp_path)
    folder = write(own, 10)
    there = sizes(folder)
    with pytest.raises(CheckpointFailed, match=r"rng_state_1.pth is missing"):
        own.seal(folder, {**there, "rng_state_1.pth": 900}, patience_s=0.1)
    torch.save({}, tmp_path / "late")
    arrives = threading.Timer(0.5, lambda: (tmp_path / "late").rename(folder / "rng_state_1.pth"))
    arrives.start()
    own.seal(folder, {**there, "rng_state_1.pth": (tmp_path / "late").stat().st_size}, patience_s=PATIENCE_S)
    assert "rng_state_1.pth" in atomic.read_json(folder / COMPLETE)["files_bytes"]


def test_one_of_other_samples_or_settings_is_ignored_and_not_counted(tmp_path: Path) -> None:
    for step in (50, 60):
        save(made(tmp_path, "old", "other"), step)
    own = made(tmp_path, "new")
    assert own.latest() is None
    mine = save(own, 10)
    found = own.latest()
    assert found is not None and found.folder == mine


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    own = made(tmp_path, keep=2)
    for step in (2, 4, 6):
        save(own, step)
    assert sorted(path.name for path in own.own.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    own.remove()
    assert not tmp_path.exists()


def test_those_that_this_process_made_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(folder: Path, files_bytes: Mapping[str, int]) -> str | None:
        read.append(folder.name)
        return damage(folder, files_bytes)

    before = save(made(tmp_path, "a"), 1)
    own = made(tmp_path, "b", keep=2)
    monkeypatch.setattr(checkpoints, "damage", note)
    for step in (2, 4, 6):
        save(own, step)
    assert "checkpoint-2" not in read[read.index("checkpoint-4") :]
    assert "checkpoint-4" not in read[read.index("checkpoint-6") :]
    assert not before.exists() and sorted(path.name for path in own.own.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_an_older_one_that_cannot_be_removed_is_no_fault_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a file that is still open leaves a `.nfs` file behind."""
    own = made(tmp_path, keep=1)
    save(own, 2)

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        newest = save(own, 4)
    assert "an older checkpoint cannot be removed now: [Errno 39] Directory not empty" in caplog.text
    found = own.latest()
    assert found is not None and found.folder == newest
    assert (own.own / "checkpoint-2").exists() and not (own.own / "checkpoint-2" / COMPLETE).exists()
    save(own, 6)
    assert [path.name for path in own.own.iterdir()] == ["checkpoint-6"]


def test_a_job_that_was_taken_for_dead_removes_nothing_that_its_successor_may_be_reading(tmp_path: Path) -> None:
    late = made(tmp_path, "late", keep=1, ours=False)
    for step in (2, 4):
        save(late, step)
    assert sorted(path.name for path in late.own.iterdir()) == ["checkpoint-2", "checkpoint-4"]


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
    for name in ("round_01", ".tmp-round_01-another"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    folder = tmp_path / ".tmp-round_01-mine"
    folder.mkdir()
    (folder / "new").touch()
    assert export.put_in_place(folder, target, "mine", lambda: True)
    export.remove_temporary(target, "mine")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-round_01-another", "round_01"]


@pytest.mark.parametrize("frozen_until", ["taken over", "committed", "released"])
def test_a_claim_that_wakes_up_late_leaves_the_weights_alone(tmp_path: Path, frozen_until: str) -> None:
    job = claimable(tmp_path)
    target = job.ws.checkpoint_dir("speaker", 1)
    late_claims, claims = job.shards(), job.shards()
    late = next(late_claims)
    assert late.lease is not None and late.still_ours()
    os.utime(late.lease.path, (0, 0))  # no heartbeat for long: it is taken for dead
    shard = next(claims)
    assert shard.lease is not None
    written = write_weights(target, shard, 1.0)
    assert export.put_in_place(written, target, token_of(shard), shard.still_ours)
    if frozen_until != "taken over":
        assert shard.commit([target / "model.safetensors"], made_from={})
    if frozen_until == "released":
        shard.lease.claims.close()

    again = write_weights(target, late, 2.0)
    assert not export.put_in_place(again, target, token_of(late), late.still_ours)
    export.remove_temporary(target, token_of(late))
    assert sorted(path.name for path in target.parent.iterdir()) == ["round_01"]
    assert load_file(target / "model.safetensors")["w"].tolist() == [1.0]
    if frozen_until == "taken over":
        assert shard.commit([target / "model.safetensors"], made_from={})
    assert manifest.read(job.ws, 1, "join", 0).path("model.safetensors") == target / "model.safetensors"


def test_a_claim_is_over_once_its_shard_is_committed(tmp_path: Path) -> None:
    job = claimable(tmp_path)
    claims = job.shards()
    shard = next(claims)
    file = shard.output("weights")
    file.touch()
    assert shard.still_ours()
    assert shard.commit([file], made_from={})
    assert not shard.still_ours()


def claimable(folder: Path) -> Job:
    """The job of a stage with one shard."""
    file = folder / "run.yaml"
    file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: late, rounds: 1}\n")
    ws = open_run(configs.load(file, [], {}, folder / "run", cwd=folder), file).ws
    whole = load(ws.root, 1, "join")
    job = replace(whole, stage=replace(whole.stage, needs=()))
    job.folder.mkdir(parents=True)
    return job


def token_of(shard: Shard) -> str:
    assert shard.lease is not None
    return shard.lease.token


def write_weights(target: Path, shard: Shard, number: float) -> Path:
    """A folder with weights under the temporary name of a claim."""
    folder = target.with_name(f".tmp-{target.name}-{token_of(shard)}")
    folder.mkdir(parents=True)
    save_file({"w": torch.tensor([number])}, folder / "model.safetensors")
    return folder


def test_the_marker_names_what_is_there(tmp_path: Path) -> None:
    folder = save(made(tmp_path), 10)
    marker, there = atomic.read_json(folder / COMPLETE), sizes(folder)
    del there[COMPLETE]
    assert marker["step"] == 10 and marker["files_bytes"] == there
    assert sorted(there) == ["adapter_model.safetensors", "optimizer.pt", checkpoints.STATE], "no pickles, no programs"
