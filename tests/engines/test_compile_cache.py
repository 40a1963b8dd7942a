"""What engines compile: slots of one process at a time, kept when they are whole, of this user alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_rl.engines import compile_cache
from hpc_rl.engines.compile_cache import SLOTS, Slot, claim, own_number, what_compiles
from hpc_rl.run.private import NotPrivate

COMPILER = {"vllm": "0.31.0", "gpu": "H100"}
HOLDER = """
import sys, time
from pathlib import Path
from hpc_rl.engines.compile_cache import claim
slot = claim(Path(sys.argv[1]), {"vllm": "0.31.0", "gpu": "H100"}, 0)
(slot.folder / "kernel").write_text("half of a ker")
if sys.argv[2] == "settle":
    slot.settle()
print(slot.folder.name, flush=True)
time.sleep(60)
"""
SLEEPER = """
import sys
from pathlib import Path
from hpc_rl.engines import compile_cache
compile_cache.TTL_S = 1.0
slot = compile_cache.claim(Path(sys.argv[1]), {"vllm": "0.31.0", "gpu": "H100"}, 0)
links_first = sys.argv[3] == "while it loads"
if links_first:
    path = slot.stable_path(sys.argv[2])
print(slot.folder.name, flush=True)
sys.stdin.readline()
try:
    path = path if links_first else slot.stable_path(sys.argv[2])
    slot.settle()
    print(path, "settled")
except compile_cache.SlotLost as error:
    print("SlotLost", error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "workspace" / "cache" / "compile"


def taken(folder: Path, number: int = 0, compiler: dict[str, str] = COMPILER) -> Slot:
    slot = claim(folder, compiler, number)
    assert slot is not None
    return slot


def begin(folder: Path, how: str) -> subprocess.Popen[str]:
    """Another process that takes a slot, compiles something into it, and stays."""
    command = [sys.executable, "-c", HOLDER, str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    """Such a process that holds slot 0."""
    process = begin(folder, how)
    assert process.stdout is not None and process.stdout.readline() == "slot_00\n"
    return process


def test_the_next_round_finds_what_was_compiled(folder: Path) -> None:
    with taken(folder, 3) as slot:
        (slot.folder / "vllm").mkdir()
        (slot.folder / "vllm" / "kernel").write_text("whole")
        slot.settle()
    with taken(folder, 3) as again:
        assert again.folder == slot.folder and (again.folder / "vllm" / "kernel").read_text() == "whole"


def test_two_processes_never_have_one_slot(folder: Path) -> None:
    other = start(folder, "settle")
    with taken(folder) as mine:
        assert mine.folder.name == "slot_01"
    other.kill()
    other.communicate()
    with taken(folder) as mine:
        assert mine.folder.name == "slot_00" and (mine.folder / "kernel").exists()


def test_processes_that_begin_together_get_different_slots(folder: Path) -> None:
    processes = [begin(folder, "settle") for _ in range(3)]
    names = [process.stdout.readline().strip() for process in processes if process.stdout]
    for process in processes:
        process.kill()
        process.communicate()
    assert len(set(names)) == 3 and all(names), names


def test_what_a_process_left_that_was_killed_while_it_started_is_not_used(folder: Path) -> None:
    other = start(folder, "start")
    other.kill()
    other.communicate()
    with taken(folder) as mine:
        assert mine.folder.name == "slot_00" and not (mine.folder / "kernel").exists()


def test_tasks_that_empty_their_slots_at_the_same_moment_do_not_disturb_each_other(folder: Path) -> None:
    numbers = range(0, SLOTS, 8)
    with ThreadPoolExecutor(len(numbers)) as pool:
        for _ in range(20):
            slots = list(pool.map(lambda number: taken(folder, number), numbers))
            for slot in slots:
                (slot.folder / "kernel").write_text("half of a ker")
                slot.close()  # not settled: the next one empties it
    for number in numbers:
        with taken(folder, number) as slot:
            assert not (slot.folder / "kernel").exists()
    assert not list(folder.rglob(".going-*"))


def test_a_task_without_a_free_slot_does_without(folder: Path) -> None:
    held = [taken(folder, 5) for _ in range(compile_cache.TRIES)]
    assert [slot.folder.name for slot in held] == ["slot_05", "slot_06", "slot_07", "slot_08"]
    assert claim(folder, COMPILER, 5) is None
    held[2].close()
    with taken(folder, 5) as slot:
        assert slot.folder.name == "slot_07"
    with taken(folder, SLOTS + 9) as slot:
        assert slot.folder.name == "slot_09", "numbers beyond the last slot begin anew"
    for slot in held:
        slot.close()


def test_other_versions_and_other_hardware_have_slots_of_their_own(folder: Path) -> None:
    with taken(folder) as one, taken(folder, 0, {**COMPILER, "vllm": "0.31.1"}) as other:
        assert one.folder.name == other.folder.name and one.folder.parent != other.folder.parent


def test_what_vllm_is_told_of_the_model_is_the_same_in_every_round(folder: Path, tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        weights = tmp_path / f"round_{number:02d}"
        weights.mkdir()
        (weights / "config.json").write_text(str(number))
        with taken(folder) as slot:
            paths.append(slot.stable_path(str(weights)))
            slot.settle()
            assert (Path(paths[-1]) / "config.json").read_text() == str(number)
    assert paths[0] == paths[1]


@pytest.mark.parametrize("taken_over", ["while it loads", "before it links"])
def test_who_stood_still_notices_that_the_path_leads_to_another_model(
    folder: Path, tmp_path: Path, taken_over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "TTL_S", 1.0)
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(folder), str(tmp_path / "round_01"), taken_over],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "slot_00\n"
    sleeper.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    with taken(folder) as slot:
        assert slot.folder.name == "slot_00"
        link = slot.stable_path(str(tmp_path / "round_02"))
        sleeper.send_signal(signal.SIGCONT)
        said, _ = sleeper.communicate("go on\n", timeout=60)
        assert Path(link).readlink() == tmp_path / "round_02"
        assert (slot.folder / "unsettled").exists(), "it is ours, and we have not settled"
    if taken_over == "before it links":
        assert said == f"{tmp_path / 'round_01'} settled\n", "it does without the link"
    else:
        assert "SlotLost" in said and f"leads to {tmp_path / 'round_02'} now" in said


def test_who_lost_a_slot_that_leads_to_the_same_model_goes_on(folder: Path, tmp_path: Path) -> None:
    with taken(folder) as slot:
        slot.stable_path(str(tmp_path))
        next(slot.folder.parent.joinpath("leases").glob(".holder-*")).unlink()  # somebody took us for dead
        with taken(folder) as other:
            other.stable_path(str(tmp_path))
            slot.settle()
            assert (other.folder / "unsettled").exists()


def test_a_slot_that_has_grown_too_large_is_emptied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 10_000)
    for size in (9_000, 2_000):
        with taken(folder) as slot:
            (slot.folder / f"kernel_{size}").write_bytes(bytes(size))
            slot.settle()
    with taken(folder) as slot:
        assert [path.name for path in slot.folder.glob("kernel*")] == []


def test_caches_of_versions_that_nobody_uses_any_more_are_removed(folder: Path) -> None:
    for age_days, version in ((40, "old"), (20, "recent")):
        with taken(folder, 0, {"vllm": version}) as slot:
            kind = slot.folder.parent
        then = time.time() - age_days * 86_400
        os.utime(kind, (then, then))
    taken(folder, 0, {"vllm": "new"}).close()
    versions = [(kind / "compiler.json").read_text() for kind in folder.iterdir()]
    assert sorted(v.split('"')[3] for v in versions) == ["new", "recent"]


def test_the_folder_is_of_this_user_alone(folder: Path) -> None:
    taken(folder).close()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(NotPrivate, match="others may write to"):
        claim(folder, COMPILER, 0)
    folder.chmod(0o750)
    taken(folder).close()
    assert folder.stat().st_mode & 0o777 == 0o700, "others could not have written: it is closed and used"


def test_nobody_else_may_exchange_it(folder: Path) -> None:
    before = os.umask(0o002)  # as for groups that share their files
    try:
        folder.parent.parent.mkdir()
        for made_by in ("others before", "claim"):
            if made_by == "others before":  # notes on weights lie there too
                folder.parent.mkdir()
            taken(folder).close()
            assert folder.parent.stat().st_mode & 0o777 == 0o755, made_by
            shutil.rmtree(folder.parent)
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give folders away")
def test_a_folder_in_one_of_another_user_is_refused(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    os.chown(folder.parent, 12345, -1)
    with pytest.raises(NotPrivate, match=f"{folder.parent} belongs to user 12345"):
        claim(folder, COMPILER, 0)


def test_a_link_to_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path)
    with pytest.raises(NotPrivate, match="is a link"):
        claim(folder, COMPILER, 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give folders away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 12345, -1)
    with pytest.raises(NotPrivate, match="belongs to user 12345"):
        claim(folder, COMPILER, 0)


def test_each_process_of_an_array_has_a_number_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.delenv("HPC_RL_WORKER", raising=False)
    assert own_number() == 0
    numbers = []
    for task in range(3):
        for worker in range(4):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            monkeypatch.setenv("HPC_RL_WORKER", str(worker))
            numbers.append(own_number(4))
    assert numbers == list(range(12))


def test_what_compiles_names_versions_and_hardware() -> None:
    found = what_compiles()
    assert found["torch"] and found["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert found["gpu"] and found == what_compiles()
