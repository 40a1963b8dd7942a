"""When a training saves and leaves, on a clock of the test's own; and what is left when it cannot be written."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
import zipfile
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpc_rl.cluster.entry import STARTED
from hpc_rl.cluster.failures import EXIT_NEVER_FITS, EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.training import TrainConfig
from hpc_rl.engines.weights import Role, Weights
from hpc_rl.training.checkpointing import checkpoints
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.checkpointing.damage import sizes
from hpc_rl.training.checkpointing.saving import Saving
from hpc_rl.training.errors import CheckpointFailed
from hpc_rl.training.ranks.distributed import World
from hpc_rl.training.ranks.leaving import EXIT_TERMINATED, Leaving
from hpc_rl.training.run import Places, TrainRun
from hpc_rl.training.task import TrainTask
from tests.full_disk import full_disk
from tests.training import small
from tests.training.test_checkpoints import claimable
from tests.waiting import PATIENCE_S


class Loop:
    """Steps and saves of given lengths. `left_s` of a job's time are there at first; None: it has no limit."""

    def __init__(self, left_s: float | None = None, leaving: Leaving | None = None, **options: Any) -> None:
        self.now = 1000.0
        self.rooms_asked = 0
        loop = self

        class UpTo(Deadline):
            def left_s(self) -> float:
                return float("inf") if left_s is None else left_s - (loop.now - 1000.0)

        self.saving = Saving(
            TrainConfig(**options), leaving or Leaving(), UpTo(), self._ask_room, stage="train",
            device=torch.device("cpu"), clock=lambda: self.now,
        )  # fmt: skip
        self.saved: list[int] = []

    def _ask_room(self) -> None:
        self.rooms_asked += 1

    def run(self, steps: int, step_s: float = 1.0, save_s: float = 0.5) -> list[int]:
        """Steps after which a checkpoint was made, until all are done or it is time to leave."""
        state, args = TrainerState(max_steps=steps), TrainingArguments("unused", use_cpu=True)
        self.saving.on_train_begin(args, state, TrainerControl())
        for step in range(1, steps + 1):
            self.now += step_s
            state.global_step = step
            control = self.saving.on_step_end(args, state, TrainerControl())
            if control.should_save:
                self.now += save_s
                self.saved.append(step)
                self.saving.on_save(args, state, control)
            if control.should_training_stop:
                break
        return self.saved


def test_every_so_many_steps_and_not_after_the_last() -> None:
    loop = Loop(save_steps=2)
    assert loop.run(6) == [2, 4] and loop.saving.exit_code is None
    assert loop.rooms_asked == 2, "before each one"
    assert loop.saving.numbers() == {"saves": 2, "save_s": 0.5, "step_s": 1.0}


def test_every_so_many_minutes_where_steps_are_long() -> None:
    assert Loop(save_steps=1000, save_minutes=10).run(10, step_s=240) == [3, 6, 9, 10]


def test_slow_saving_is_done_less_often_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """A save of 10 minutes: after it at least 20 times as long goes by, 200 minutes or 50 steps."""
    loop = Loop(save_steps=1000, save_minutes=10)
    assert loop.run(120, step_s=240, save_s=600) == [3, 53, 103, 120]
    assert "a checkpoint takes 600 s, so one follows every 200 minutes and not every 10 (save_minutes)" in caplog.text


def test_a_job_with_a_time_limit_measures_at_once_and_leaves_while_there_is_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    loop = Loop(left_s=1000, save_steps=1000)
    saved = loop.run(50, step_s=100, save_s=30)
    assert saved == [1, 7, 9], "after step 8 it is second 860, and another step with its save takes 130"
    assert loop.saving.exit_code == EXIT_OUT_OF_TIME and loop.now - 1000 < 1000
    assert (
        "another step of 100 s and a checkpoint do not fit into the 40 s that are left; saving at step 9" in caplog.text
    )
    assert "a step takes up to 100.0 s, a checkpoint 30.0 s" in caplog.text


def test_the_slowest_of_the_last_steps_counts() -> None:
    loop = Loop(left_s=10_000, save_steps=1000)
    loop.run(1, step_s=900)
    assert loop.saving.step_s == 900
    loop.run(20, step_s=10)
    assert loop.saving.step_s == 10, "the first one, with all that it has to load, is long ago"


@pytest.mark.parametrize("steps", [5, 1])
def test_told_to_leave_it_saves_and_leaves_after_the_last_step_too(steps: int) -> None:
    leaving = Leaving()
    leaving.asked = True
    loop = Loop(leaving=leaving, save_steps=1000)
    assert loop.run(steps) == [1] and loop.saving.exit_code == EXIT_TERMINATED


def test_after_the_last_step_it_saves_what_would_take_long_to_do_again() -> None:
    """Its final weights follow: a job that ends while they are written has only those to write again."""
    slow = Loop(save_steps=4)
    assert slow.run(6, step_s=40) == [4, 6] and slow.saving.exit_code is None
    assert Loop(save_steps=4).run(6, step_s=20) == [4], "40 s"
    assert Loop(save_steps=4).run(6, step_s=40, save_s=50) == [4], "less than two checkpoints' worth"


def test_where_the_final_weights_do_not_fit_either_it_saves_and_leaves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = Loop(left_s=170, save_steps=1000)
    assert loop.run(2, step_s=50, save_s=30) == [1, 2] and loop.saving.exit_code == EXIT_OUT_OF_TIME
    assert "the final weights and a checkpoint do not fit into the 40 s that are left; saving at step 2" in caplog.text
    enough = Loop(left_s=200, save_steps=1000)
    assert enough.run(2, step_s=50, save_s=30) == [1] and enough.saving.exit_code is None


def test_a_training_that_is_done_needs_no_room_for_a_checkpoint(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise CheckpointFailed("no room for a checkpoint")

    loop = Loop(save_steps=1000)
    monkeypatch.setattr(loop.saving, "_check_room", full)
    assert loop.run(3, step_s=100) == [] and loop.saving.exit_code is None
    assert "no room for a checkpoint; the final weights are written without it" in caplog.text


def test_a_signal_that_comes_too_late_for_a_checkpoint_is_said_while_it_can_be_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Loop(save_steps=1, leaving=Leaving(grace_s=100)).run(3, step_s=40, save_s=20)
    assert not caplog.records
    Loop(save_steps=1, leaving=Leaving(grace_s=100)).run(3, step_s=70, save_s=30)
    assert "has 100 s, and a step with its checkpoint takes 100 s" in caplog.text
    assert "Raise stages.train.signal_delay_s to 135 or more" in caplog.text


def run_of(folder: Path, leaving: Leaving, **more: Any) -> TrainRun:
    """A training of no run in particular."""
    task = TrainTask("sft", TrainConfig(), "train", Role("speaker", SpeakerConfig(path=str(folder))), 0)
    start, places = Weights(str(folder), None, "hash"), Places(folder, folder, None, "token", folder.joinpath, None)
    return TrainRun(claimable(folder), task, World(), leaving, start, places, lambda *_: None, lambda: True, **more)


@pytest.mark.parametrize(
    ("left_s", "had_s", "saves", "scored", "code"),
    [
        (-1, 900, 0, False, EXIT_NEVER_FITS),
        (-1, 900, 1, False, EXIT_TERMINATED),  # it got further
        (-1, 900, 0, True, EXIT_TERMINATED),  # so did this one: it scores the data first
        (60, 900, 0, False, EXIT_TERMINATED),  # preempted
        (-1, 300, 0, False, EXIT_TERMINATED),  # for most of its time it waited for its turn
    ],
)
def test_a_job_whose_whole_time_is_too_short_is_not_queued_again_for_ever(
    left_s: float, had_s: float, saves: int, scored: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saving = time.time(), Loop().saving
    saving.saves = saves
    monkeypatch.setenv(STARTED, repr(now - 1000))
    with Leaving() as leaving:
        run_of(
            tmp_path, leaving, deadline=Deadline(now + left_s), got_further=scored, _saving=saving, _began=now - had_s
        )
        with pytest.raises(SystemExit) as leave:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(PATIENCE_S)
    assert leave.value.code == code


def test_on_a_full_disk_the_last_checkpoint_stays_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    """The same loss in every step as without, and the same weights: random states are part of a checkpoint."""
    whole = small.trainer(small.opened(tmp_path / "whole"))
    whole.train()

    class FullAtStep4(small.Small):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            with full_disk() if self.state.global_step == 4 else nullcontext():
                super()._save_checkpoint(model, trial)

    first = small.opened(tmp_path / "work")
    with pytest.raises(CheckpointFailed, match=r"checkpoint-4 cannot be written, with [\d.e+]+ GB free: "):
        small.trainer(first, kind=FullAtStep4).train()
    half = first.own / "checkpoint-4"
    assert half.exists() and not (half / checkpoints.COMPLETE).exists()

    again = small.opened(tmp_path / "work", "b")
    assert not half.exists()
    found = again.latest()
    assert found is not None and found.folder == first.own / "checkpoint-2"
    resumed = small.trainer(again)
    resumed.train(resume_from_checkpoint=str(found.folder))
    assert small.losses(resumed) == small.losses(whole) and len(small.losses(whole)) == small.STEPS
    for name, tensor in small.weights(whole).items():
        assert torch.equal(tensor, small.weights(resumed)[name])


def test_where_the_next_checkpoint_does_not_fit_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = small.opened(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 0, 100))
    with pytest.raises(CheckpointFailed, match=r"no room for a checkpoint of \S+ GB at .*: 1e-07 GB are free"):
        small.trainer(own).train()
    assert [path.name for path in own.own.iterdir()] == ["checkpoint-2"]


def test_a_job_whose_time_is_up_has_done_a_step_all_the_same(tmp_path: Path) -> None:
    """Else it would be queued again and again without ever getting further."""
    made = small.trainer(small.opened(tmp_path), deadline=Deadline(0.0))
    made.train()
    assert made.state.global_step == 1 and made.saving.exit_code == EXIT_OUT_OF_TIME
    found = small.opened(tmp_path, "b").latest()
    assert found is not None and found.step == 1


def test_one_that_was_saved_after_its_last_step_goes_on_with_nothing_left_to_do(tmp_path: Path) -> None:
    leaving = Leaving()

    class AskedAtTheEnd(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            leaving.asked = state.global_step == small.STEPS - 1

    made = small.trainer(small.opened(tmp_path), options=TrainConfig(save_steps=4), leaving=leaving)
    made.add_callback(AskedAtTheEnd())
    made.train()
    assert made.saving.exit_code == EXIT_TERMINATED

    again = small.opened(tmp_path, "b")
    found = again.latest()
    assert found is not None and found.step == small.STEPS
    resumed = small.trainer(again, model=small.Words().apply(_forget))
    resumed.train(resume_from_checkpoint=str(found.folder))
    assert resumed.saving.exit_code is None and small.losses(resumed) == small.losses(made)
    for name, tensor in small.weights(made).items():
        assert torch.equal(tensor, small.weights(resumed)[name])


def _forget(layer: torch.nn.Module) -> None:
    for weight in layer.parameters(recurse=False):
        torch.nn.init.zeros_(weight)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_one_that_only_its_reader_finds_damaged_gives_way_to_the_one_before(name: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = small.opened(work)
    small.trainer(first).train()
    newest, before = first.own / "checkpoint-4", first.own / "checkpoint-2"
    spoil(newest / name)
    with pytest.raises(CheckpointFailed) as stopped:
        attempt(tmp_path / "1", small.opened(work, "b"))
    said = str(stopped.value)
    assert said.startswith(f"{newest} looks whole, but cannot be gone on from (UnpicklingError: "), said
    assert said.endswith(f"The next attempt goes on from the one before it: {before}")

    third = small.opened(work, "c")
    run = attempt(tmp_path / "2", third)
    assert run.resumed_from == 2
    found = third.latest()
    assert found is not None and found.folder == third.own / "checkpoint-3"
    assert before.exists() and not newest.exists(), "two are kept"


def test_what_is_not_the_checkpoint_s_fault_is_not_held_against_it(tmp_path: Path) -> None:
    class Large(small.Small):
        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    work = tmp_path / "work"
    first = small.opened(work)
    small.trainer(first).train()
    with pytest.raises(torch.OutOfMemoryError):
        attempt(tmp_path / "1", small.opened(work, "b"), kind=Large)
    found = first.latest()
    assert found is not None and found.folder == first.own / "checkpoint-4"


def test_the_only_one_is_tried_again_and_said_how_to_do_without(tmp_path: Path) -> None:
    own = small.opened(tmp_path)
    small.trainer(own, options=TrainConfig(save_steps=4)).train()
    (only,) = own.own.iterdir()
    assert own.distrust(only, "for a test").endswith(f"to begin anew, remove {only}")
    found = small.opened(tmp_path, "b").latest()
    assert found is not None and found.folder == only


def attempt(folder: Path, checkpoints: Checkpoints, **more: Any) -> TrainRun:
    """Go on from the latest checkpoint, as a job does, for one step."""
    folder.mkdir()
    made = small.trainer(checkpoints, deadline=Deadline(0.0), **more)
    run = run_of(folder, Leaving(), _saving=made.saving)
    with pytest.raises(SystemExit):
        run.train(made, checkpoints)
    return run


def spoil(file: Path) -> None:
    """Other bytes in the first entry of an archive of torch.save, the pickle; its table of contents is left alone."""
    with zipfile.ZipFile(file) as archive:
        pickle = archive.infolist()[0]
    assert pickle.filename.endswith("data.pkl")
    with file.open("r+b") as opened:
        opened.seek(pickle.header_offset + 26)  # PKZIP: lengths of the name and of what is between it and the content
        lengths = opened.read(4)
        opened.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), os.SEEK_CUR)
        opened.write(b"\xff" * pickle.file_size)


def test_the_room_for_a_checkpoint_is_known_from_the_one_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = small.opened(tmp_path / "work")
    small.trainer(own).train()
    found = own.latest()
    assert found is not None
    on_disk = sum(size for name, size in sizes(found.folder).items() if name != checkpoints.COMPLETE)
    assert found.size == on_disk
    again = small.opened(tmp_path / "work", "b")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(found.size, 1, found.size - 1))
    made = small.trainer(again, options=TrainConfig(save_steps=5))
    (tmp_path / "run").mkdir()
    run = run_of(tmp_path / "run", Leaving(), _saving=made.saving, _seal=made._seal)
    with pytest.raises(CheckpointFailed, match="no room for a checkpoint"):
        run.train(made, again)
    assert not list(again.own.iterdir()), "nothing was written"
