"""At most one holder, take-over of the dead only: one process step by step, then many of them, killed and frozen."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from hpc_rl.run.lease import Lease, acquire, acquire_patiently, look
from tests.waiting import PATIENCE_S, wait_for

LONG_S = 3600.0

HOLDER = """
import sys, time
from pathlib import Path
from hpc_rl.run.lease import acquire
lease = acquire(Path(sys.argv[1]), "shard", float(sys.argv[2]))
print(lease.generation if lease else "none", flush=True)
for line in sys.stdin:
    if line.strip() == "lost?":
        print(lease.lost, flush=True)
    else:
        lease.release()
        print("released", flush=True)
"""

CONTENDER = """
import os, random, sys, time
from pathlib import Path
from hpc_rl.run.lease import acquire
folder, me, turns = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
chance = random.Random(me)
print("ready", flush=True)
sys.stdin.readline()
while turns:
    lease = acquire(folder / "leases", "shard", 3600.0)
    if lease is None:
        continue
    turns -= 1
    os.write(log, f"+{me}\\n".encode())
    time.sleep(chance.uniform(0, 0.004))
    os.write(log, f"-{me}\\n".encode())
    lease.release()
"""


class Process:
    """Another process that holds the lease `shard`, or tried to."""

    def __init__(self, folder: Path, ttl_s: float, prefix: tuple[str, ...] = ()) -> None:
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-c", HOLDER, str(folder), str(ttl_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.generation = self._answer()

    def _answer(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()
        return self._answer()

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()
        self.popen.kill()
        self.popen.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts processes that take the lease in `tmp_path`."""
    started = []

    def start_one(ttl_s: float = LONG_S, prefix: tuple[str, ...] = ()) -> Process:
        started.append(Process(tmp_path, ttl_s, prefix))
        return started[-1]

    yield start_one
    for process in started:
        process.end()


def must(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def make_stale(lease: Lease) -> None:
    """As if its heart had last beaten a day ago."""
    os.utime(lease.path, (time.time() - 86_400,) * 2)


# step by step


def test_a_held_lease_cannot_be_taken_and_a_released_one_at_once(tmp_path: Path) -> None:
    first = must(acquire(tmp_path, "shard", LONG_S))
    assert acquire(tmp_path, "shard", LONG_S) is None
    first.release()
    with must(acquire(tmp_path, "shard", LONG_S)) as second:
        assert (first.generation, second.generation) == (1, 2)
        assert first.token != second.token
        assert first.lost
        assert not second.lost


def test_leases_with_other_names_do_not_meet(tmp_path: Path) -> None:
    names = ["shard_0001", "shard_0010", "shard_0001.lease", "shard"]
    leases = [must(acquire(tmp_path, name, LONG_S)) for name in names]
    assert not any(lease.lost for lease in leases)
    for lease in leases:
        lease.release()
    assert all(look(tmp_path, name).released for name in names)


def test_looking_at_a_lease_that_nobody_ever_took_finds_it_free(tmp_path: Path) -> None:
    state = look(tmp_path / "nowhere", "shard")
    assert (state.generation, state.is_held(LONG_S)) == (0, False)
    assert not (tmp_path / "nowhere").exists()


def test_lower_generations_are_swept_up(tmp_path: Path) -> None:
    for _ in range(3):
        must(acquire(tmp_path, "shard", LONG_S)).release()
    with must(acquire(tmp_path, "shard", LONG_S)):
        names = sorted(entry.name for entry in tmp_path.iterdir())
        assert names[1:] == ["shard.lease.0004"] and names[0].startswith(".holder-"), names


@pytest.mark.parametrize(("said", "known_dead"), [({}, False), ({"user": os.getuid(), "shoe_size": 43}, True)])
def test_a_lease_that_other_code_took_can_be_read(tmp_path: Path, said: dict[str, int], known_dead: bool) -> None:
    """A run goes on with code that knows more of a holder, or less: who is not said to be our user's may be alive."""
    former = must(acquire(tmp_path, "shard", LONG_S))
    written = json.loads(former.path.read_text())
    del written["user"]
    former.path.write_text(json.dumps({**written, "pid": 2**22 + 1, **said}))
    found = look(tmp_path, "shard")
    assert found.holder is not None and found.holder.token == written["token"]
    assert found.holder.is_known_dead() == known_dead == (not found.is_held(LONG_S))
    make_stale(former)
    assert must(acquire(tmp_path, "shard", 60.0)).generation == 2


def test_a_heart_that_beats_keeps_the_lease_longer_than_its_time_to_live(tmp_path: Path) -> None:
    with must(acquire(tmp_path, "shard", 0.5)) as lease:
        for _ in range(3):
            make_stale(lease)
            wait_for(lambda: look(tmp_path, "shard").is_held(LONG_S), "its next beat")
            assert acquire(tmp_path, "shard", LONG_S) is None
        assert not lease.lost


def test_patience_gets_a_lease_that_is_released_meanwhile(tmp_path: Path) -> None:
    first = must(acquire(tmp_path, "shard", LONG_S))
    threading.Timer(0.3, first.release).start()
    must(acquire_patiently(tmp_path, "shard", LONG_S, PATIENCE_S, poll_s=0.02)).release()


def test_patience_has_an_end(tmp_path: Path) -> None:
    with must(acquire(tmp_path, "shard", LONG_S)):
        started = time.monotonic()
        assert acquire_patiently(tmp_path, "shard", LONG_S, patience_s=0.3, poll_s=0.02) is None
        assert time.monotonic() - started >= 0.3


def test_a_holder_whose_folder_was_removed_has_lost_the_lease_and_may_release_it(tmp_path: Path) -> None:
    lease = must(acquire(tmp_path / "stage", "shard", LONG_S))
    shutil.rmtree(tmp_path / "stage")
    assert lease.lost
    lease.release()
    assert not (tmp_path / "stage").exists()


# late takers


@contextmanager
def held_up_before(function: str, call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Runs `call` in a thread up to its call of `function`; what is yielded lets it go on and gives its result."""
    arrived, go_on = threading.Event(), threading.Event()
    result: list[Any] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == function and not arrived.is_set():
            arrived.set()
            go_on.wait(PATIENCE_S)

    def run() -> None:
        sys.settrace(trace)
        result.append(call())

    def finish() -> Any:
        go_on.set()
        thread.join(PATIENCE_S)
        return result[0]

    thread = threading.Thread(target=run)
    thread.start()
    assert arrived.wait(PATIENCE_S)
    yield finish
    finish()


def test_a_late_taker_gets_nothing_when_another_took_the_stale_lease_meanwhile(tmp_path: Path) -> None:
    dead = must(acquire(tmp_path, "shard", LONG_S))
    make_stale(dead)
    with held_up_before("link", lambda: acquire(tmp_path, "shard", LONG_S)) as late:
        second = must(acquire(tmp_path, "shard", LONG_S))
        assert late() is None
    assert (dead.lost, second.lost) == (True, False)
    second.release()


def test_a_late_taker_gets_nothing_when_the_lease_went_through_other_hands_meanwhile(tmp_path: Path) -> None:
    dead = must(acquire(tmp_path, "shard", LONG_S))
    make_stale(dead)
    with held_up_before("link", lambda: acquire(tmp_path, "shard", LONG_S)) as late:
        must(acquire(tmp_path, "shard", LONG_S)).release()
        third = must(acquire(tmp_path, "shard", LONG_S))
        # the name that the late one wants to create is free again, since lower generations are swept up
        assert late() is None
    assert not third.lost
    assert acquire(tmp_path, "shard", LONG_S) is None
    third.release()


def test_a_first_taker_that_comes_late_gets_nothing(tmp_path: Path) -> None:
    with held_up_before("link", lambda: acquire(tmp_path, "shard", LONG_S)) as late:
        must(acquire(tmp_path, "shard", LONG_S)).release()
        third = must(acquire(tmp_path, "shard", LONG_S))
        assert late() is None
    assert not third.lost
    third.release()


class Takers(RuleBasedStateMachine):
    """Any order of takes, releases, freezes and wake-ups: the highest generation is the one holder."""

    leases: Bundle[Lease] = Bundle("leases")

    @initialize()
    def make_folder(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.holder: Lease | None = None
        self.stale = False
        self.taken: list[Lease] = []

    @rule(target=leases)
    def take(self) -> Any:
        free = self.holder is None or self.stale
        lease = acquire(self.folder, "shard", LONG_S)
        assert (lease is not None) == free
        if lease is None:
            return self.taken[-1]
        self.holder, self.stale = lease, False
        self.taken.append(lease)
        return lease

    @precondition(lambda self: self.holder is not None)
    @rule()
    def the_holder_freezes(self) -> None:
        assert self.holder is not None
        make_stale(self.holder)
        self.stale = True

    @precondition(lambda self: self.stale)
    @rule()
    def the_holder_wakes_up_in_time(self) -> None:
        assert self.holder is not None
        os.utime(self.holder.path)
        self.stale = False

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        lease.release()
        if lease is self.holder:
            self.holder, self.stale = None, False

    @invariant()
    def only_the_last_taker_holds(self) -> None:
        assert all(lease.lost for lease in self.taken[:-1])
        if self.holder is not None:
            assert not self.holder.lost
            assert look(self.folder, "shard").is_held(LONG_S) is not self.stale

    def teardown(self) -> None:
        for lease in self.taken:
            lease.release()
        shutil.rmtree(self.folder)


Takers.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_any_order_of_takes_releases_freezes_and_wake_ups_leaves_one_holder = Takers.TestCase


# other processes


def test_the_lease_of_a_killed_process_on_this_host_is_free_at_once(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    killed = start()
    assert acquire(tmp_path, "shard", LONG_S) is None
    killed.signal(signal.SIGKILL)
    lease = acquire_patiently(tmp_path, "shard", LONG_S, PATIENCE_S, poll_s=0.01)
    assert lease is not None, "a zombie that nobody has waited for is dead too"
    assert lease.generation == 2
    lease.release()


def test_a_frozen_process_loses_its_lease_and_finds_out(tmp_path: Path, start: Callable[..., Process]) -> None:
    frozen = start(ttl_s=0.5)
    frozen.signal(signal.SIGSTOP)
    lease = acquire_patiently(tmp_path, "shard", 0.5, PATIENCE_S, poll_s=0.05)
    frozen.signal(signal.SIGCONT)
    assert lease is not None
    assert frozen.ask("lost?") == "True"
    assert frozen.ask("release") == "released"
    assert not lease.lost, "what it releases is not ours"
    assert acquire(tmp_path, "shard", LONG_S) is None
    lease.release()


def test_the_lease_of_another_host_is_judged_by_its_heartbeat_alone(tmp_path: Path) -> None:
    lease = must(acquire(tmp_path, "shard", LONG_S))
    record = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**record, "host": "elsewhere", "pid": 2**22 + 1}))
    assert acquire(tmp_path, "shard", LONG_S) is None
    make_stale(lease)
    must(acquire(tmp_path, "shard", LONG_S)).release()


@pytest.mark.parametrize("field", ["user", "pid_space"])
def test_so_is_that_of_another_user_or_of_a_host_with_the_same_name(tmp_path: Path, field: str) -> None:
    lease = must(acquire(tmp_path, "shard", LONG_S))
    record = json.loads(lease.path.read_text())
    boot, numbering = record["pid_space"].split()
    assert numbering.startswith("pid:[")
    another = {"user": record["user"] + 1, "pid_space": f"{boot[::-1]} {numbering}"}[field]
    lease.path.write_text(json.dumps({**record, field: another, "pid": 2**22 + 1}))
    assert acquire(tmp_path, "shard", LONG_S) is None, "/proc says nothing about it"
    make_stale(lease)
    must(acquire(tmp_path, "shard", LONG_S)).release()


def test_a_process_with_the_number_of_a_dead_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    lease = must(acquire(tmp_path, "shard", LONG_S))
    record = json.loads(lease.path.read_text())
    assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
    lease.path.write_text(json.dumps({**record, "pid_start": str(int(record["pid_start"]) - 1)}))
    must(acquire(tmp_path, "shard", LONG_S)).release()


def test_a_container_that_counts_processes_for_itself_is_not_taken_for_dead(
    tmp_path: Path, start: Callable[..., Process]
) -> None:
    unshare = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a PID namespace")
    inside = start(prefix=unshare)
    assert inside.generation == "1"
    assert acquire(tmp_path, "shard", LONG_S) is None
    assert inside.ask("lost?") == "False"


def test_somebody_who_may_only_read_can_look() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    folder = Path(tempfile.mkdtemp())

    def look_as_nobody() -> None:
        os.setuid(65534)
        sys.exit(0 if look(folder, "shard").is_held(60) else 1)

    try:
        folder.chmod(0o755)
        with must(acquire(folder, "shard", LONG_S)) as lease:
            lease.path.chmod(0o644)
            nobody = multiprocessing.get_context("fork").Process(target=look_as_nobody)
            nobody.start()
            nobody.join()
            assert nobody.exitcode == 0
    finally:
        shutil.rmtree(folder)


def test_on_a_disk_without_room_for_another_file_one_can_look(tmp_path: Path) -> None:
    code = """if True:
        import errno, pathlib, subprocess, sys
        from hpc_rl.run.lease import acquire, look
        disk = pathlib.Path(sys.argv[1])
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=4", "none", str(disk)], check=True)
        held = acquire(disk, "shard", 60)
        number = 0
        try:
            while True:
                (disk / str(number := number + 1)).touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert held is not None and look(disk, "shard").is_held(60)
        try:
            acquire(disk, "another", 60)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            sys.exit("a lease without a file")
    """
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    subprocess.run(["unshare", "--mount", sys.executable, "-c", code, str(tmp_path)], check=True)


def test_processes_that_fight_for_a_lease_never_hold_it_together(tmp_path: Path) -> None:
    turns = 25
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(tmp_path), me, str(turns)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for me in ("a", "b", "c", "d")
    ]
    assert [contender.stdout and contender.stdout.readline() for contender in contenders] == [b"ready\n"] * 4
    for contender in contenders:
        assert contender.stdin is not None
        contender.stdin.write(b"go\n")
        contender.stdin.flush()
    for contender in contenders:
        contender.communicate(timeout=PATIENCE_S)
    assert [contender.returncode for contender in contenders] == [0] * 4
    lines = (tmp_path / "log").read_text().split()
    assert all(a[0] == "+" and b == f"-{a[1]}" for a, b in zip(lines[::2], lines[1::2], strict=True))
    assert Counter(line[1] for line in lines[::2]) == dict.fromkeys("abcd", turns)
