"""The stream: full batches across shards, retries in the same batch, and shards that are whole, whatever happens."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.engines.base import Request, Sampling
from hpc_rl.engines.pool import RequestRefused
from hpc_rl.orchestrate import job as jobs
from hpc_rl.orchestrate.job import Job
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.presence import holder_path, see
from hpc_rl.run.shard_leases import leases_of, read_listing
from hpc_rl.sampling.at_work import WriteFailure
from hpc_rl.sampling.pace import NeverFits
from hpc_rl.sampling.record import TaskRecord, read_records
from hpc_rl.sampling.stream import UNPUBLISHED, Ending
from tests.engines.letters import LettersEngine
from tests.orchestrate.shards_recipe import SHARDS
from tests.sampling.letters_task import ROLES, ROWS, K, LettersSource, one_by_one, plain, published, stream
from tests.waiting import PATIENCE_S, wait_for

CONFIG = """\
recipe: tests.orchestrate.shards_recipe
run: {name: letters, rounds: 1, seed: 3, gate_patience_s: 0.2}
"""
FIRST = ROWS * len(ROLES) * K
"""Requests of a shard before any retry."""

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    def make(*overrides: str) -> Job:
        file = tmp_path / "letters.yaml"
        file.write_text(CONFIG)
        run = open_run(configs.load(file, overrides, {}, tmp_path / "run", cwd=tmp_path), file)
        return jobs.load(run.ws.root, 1, "cut")

    return make


def run(job: Job, engine: LettersEngine, **settings: Any) -> Ending:
    with ExitStack() as stack:
        return stream(job, stack, engine, **settings).run()


def done(job: Job) -> frozenset[int]:
    return manifest.done_shards(job.ws, 1, "cut")


def record(job: Job) -> TaskRecord:
    (found,) = read_records(job.folder)
    return found


class Watched(LettersEngine):
    """Writes down what it is asked, and how full it is at each step."""

    def __init__(self, capacity: int, pause_s: float = 0.0) -> None:
        super().__init__(capacity, pause_s, None)
        self.asked: list[str] = []
        self.filled: list[tuple[int, frozenset[str]]] = []  # at each step: requests, and the shards they are of
        self.before_step: Callable[[], None] = lambda: None

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        super().submit(key, request, sampling)
        self.asked.append(key)

    def step(self) -> list[tuple[str, Any]]:
        self.before_step()
        self.filled.append((self.unfinished, frozenset(key.partition("/")[0] for key in self._rows)))
        return super().step()


# what is drawn


@pytest.mark.parametrize("capacity", [1, 5, 1000])
def test_the_stream_draws_what_is_drawn_one_by_one(make_job: MakeJob, capacity: int) -> None:
    job = make_job()
    assert run(job, LettersEngine(capacity, 0.0, None)) is Ending.DONE
    assert plain(published(job)) == plain(sorted_(one_by_one(LettersSource())))


def sorted_(samples: Sequence[Any]) -> list[Any]:
    return sorted(samples, key=lambda s: (s.group, s.role, s.attempt))


def test_manifests_say_what_was_drawn_and_what_counts(make_job: MakeJob) -> None:
    job = make_job()
    run(job, LettersEngine(8, 0.0, None))
    for shard in range(SHARDS):
        samples, made = published(job, [shard]), manifest.read(job.ws, 1, "cut", shard)
        assert made.metrics["task"] == record(job).name
        assert made.metrics["samples"] == len(samples)
        assert made.metrics["tokens"] == sum(len(s.token_ids) for s in samples)
        assert made.metrics["cut_off"] == sum(s.finish_reason == "length" for s in samples)
        assert made.metrics["accepted"] == sum(s.accepted for s in samples)
        counted = Counter(s.row_id + s.role for s in samples if s.accepted)
        assert made.metrics["exhausted"] == ROWS * len(ROLES) - sum(n == K for n in counted.values())
        assert made.made_from["weights"] == "w" and made.made_from["roles"] == list(ROLES)


def test_rows_without_a_prompt_and_shards_without_a_row_are_published_too(make_job: MakeJob) -> None:
    job, source = make_job(), LettersSource(without=[2], empty=[4])
    assert run(job, LettersEngine(4, 0.0, None), source=source) is Ending.DONE
    assert plain(published(job)) == plain(sorted_(one_by_one(source)))
    dropped = [manifest.read(job.ws, 1, "cut", shard).metrics["dropped"] for shard in range(SHARDS)]
    assert (dropped[2], dropped[4], sum(dropped)) == (1, 3, 4)


def test_a_prompt_that_the_engine_refuses_is_named_by_its_row(make_job: MakeJob) -> None:
    with pytest.raises(ValueError, match=r"row s7r0, role plain: the prompt 'plain refuse7 ' is too long"):
        run(make_job(), LettersEngine(4, 0.0, None), source=LettersSource(refused=7))


# the batch


def test_the_batch_is_full_across_shards_and_what_is_held_is_bounded(make_job: MakeJob) -> None:
    engine = Watched(FIRST)
    with ExitStack() as stack:
        loop = stream(make_job(), stack, engine)

        def the_file_system_is_faster() -> None:
            wait([*loop._publishing, *filter(None, [loop._ahead.claiming])])

        engine.before_step = the_file_system_is_faster
        loop.run()
    filled = [requests for requests, _ in engine.filled]
    assert max(filled) < FIRST + 2 * FIRST, "the batch, a shard to spare, and the shard that filled it up"
    last = next(place for place, (_, shards) in enumerate(engine.filled) if f"{SHARDS}" in shards)
    assert last > 20
    assert all(requests >= engine.capacity for requests in filled[2:last]), "from the second shard on"
    assert max(len(shards) for _, shards in engine.filled) >= 2


def test_the_first_step_waits_for_a_full_batch(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_rl.engines.feed.FILL_S", 60.0)
    engine = Watched(3 * FIRST)
    run(make_job(), engine)
    assert engine.filled[0][0] >= engine.capacity


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_task_holds_no_more_than_its_share_of_what_is_left(make_job: MakeJob, others: int) -> None:
    job, engine = make_job(), Watched(SHARDS * FIRST)
    with ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(job.claims())  # alive, and still loading its engine
        loop = stream(job, stack, engine)
        engine.before_step = lambda: wait([*filter(None, [loop._ahead.claiming])]) and None
        assert loop.run() is Ending.DONE
    held = max(len(shards) for _, shards in engine.filled)
    assert held > SHARDS / 2 if not others else held == SHARDS / (others + 1)


def test_a_retry_goes_back_into_the_running_batch(make_job: MakeJob) -> None:
    engine = Watched(10 * FIRST)
    job = make_job()
    run(job, engine)
    retries = [place for place, key in enumerate(engine.asked) if not key.endswith(("-g0", "-g1"))]
    assert len(retries) == len(published(job)) - SHARDS * FIRST > 0
    assert retries[0] < max(place for place, key in enumerate(engine.asked) if key.endswith("-g0"))


def test_attempts_of_a_task_share_one_prompt(make_job: MakeJob) -> None:
    asked: dict[str, list[Request]] = {}

    class Kept(LettersEngine):
        def submit(self, key: str, request: Request, sampling: Sampling) -> None:
            asked.setdefault(key.rpartition("-g")[0], []).append(request)
            super().submit(key, request, sampling)

    run(make_job(), Kept(8, 0.0, None))
    assert all(request.prompt is requests[0].prompt for requests in asked.values() for request in requests)


# several tasks


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts tasks, each as a process of its own, and ends those that are left."""
    started = []

    def start_one(job: Job, environment: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.sampling.letters_task", "--workspace", str(job.ws.root), "--round", "1"]
        started.append(
            subprocess.Popen(
                [*command, "--stage", "cut"],
                cwd=source_root(),
                env={**os.environ, "LETTERS": json.dumps(settings), **(environment or {})},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def assert_whole(job: Job) -> None:
    """Every attempt is there exactly once, and is what it is when drawn alone."""
    assert plain(published(job)) == plain(sorted_(one_by_one(LettersSource())))


def test_several_tasks_share_the_shards(make_job: MakeJob, start: Start) -> None:
    job = make_job()
    tasks = [start(job, pause_s=0.02, together=3) for _ in range(3)]
    assert [task.wait(PATIENCE_S) for task in tasks] == [0, 0, 0]
    assert_whole(job)
    assert len({manifest.read(job.ws, 1, "cut", shard).metrics["task"] for shard in range(SHARDS)}) == 3


def test_a_task_that_is_killed_leaves_its_shards_to_another(make_job: MakeJob, start: Start) -> None:
    job = make_job()
    victim = start(job, pause_s=0.02)
    wait_for(lambda: done(job), "a shard is done")
    victim.kill()
    before = done(job)
    assert len(before) < SHARDS
    assert start(job).wait(PATIENCE_S) == 0
    assert_whole(job)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_task_that_is_told_to_leave_publishes_what_is_complete_and_gives_the_rest_back(
    make_job: MakeJob, start: Start, number: signal.Signals
) -> None:
    job = make_job("run.lease_ttl_s=1000")
    first = start(job, pause_s=0.02)
    wait_for(lambda: done(job), "a shard is done")
    first.send_signal(number)
    assert first.wait(PATIENCE_S) == 128 + signal.SIGTERM
    (left,) = read_records(job.folder)
    assert left.ended is not None and left.lost_tokens > 0
    kept = [s for shard in done(job) for s in published(job, [shard])]
    assert left.kept_tokens == sum(len(s.token_ids) for s in kept)
    assert left.tokens == left.kept_tokens + left.lost_tokens
    assert run(job, LettersEngine(8, 0.0, None)) is Ending.DONE, "without waiting for any heartbeat to stop"
    assert_whole(job)


class Slow:
    """Claims with something that happens before or after each commit."""

    def __init__(
        self, claims: Any, on_commit: Callable[[], None] = lambda: None, after_commit: Callable[[], None] = lambda: None
    ) -> None:
        self._claims, self._on_commit, self._after_commit = claims, on_commit, after_commit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claims, name)

    def next(self) -> Any:
        shard = self._claims.next()
        if shard is not None:
            commit = shard.commit

            def commit_late(*given: Any, **more: Any) -> Any:
                self._on_commit()
                won = commit(*given, **more)
                self._after_commit()
                return won

            shard.commit = commit_late
        return shard


def test_sigterm_does_not_cut_a_commit_short(make_job: MakeJob) -> None:
    job = make_job()
    begun = threading.Event()

    def tell_to_leave() -> None:
        if not begun.is_set():
            begun.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    with ExitStack() as stack:
        claims = Slow(stack.enter_context(job.claims()), tell_to_leave)
        with pytest.raises(SystemExit) as left:
            stream(job, stack, LettersEngine(4, 0.005, None), claims=claims).run()
    assert left.value.code == 128 + signal.SIGTERM
    assert 1 <= len(done(job)) < SHARDS
    assert record(job).shards == len(done(job))


def test_the_engine_does_not_wait_for_the_file_system_and_no_more_is_claimed_than_that_can_take(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, engine = make_job(), Watched(1)
    held, drawn_meanwhile, claimed_meanwhile = threading.Event(), set[int](), list[int]()

    def commit_late() -> None:
        assert held.wait(PATIENCE_S), "the loop waits for the file system, and the file system for the loop"

    with ExitStack() as stack:
        claims = Slow(stack.enter_context(job.claims()), commit_late)
        loop = stream(job, stack, engine, claims=claims)
        wait_as_ever = loop._wait_for

        def the_file_system_goes_on_when_nothing_else_does(*given: Any) -> None:
            if not held.is_set() and not len(loop._batch) and loop._ahead.claiming is None:
                drawn_meanwhile.update(int(shard) for _, shards in engine.filled for shard in shards)
                claimed_meanwhile.append(len(list(job.folder.rglob("shard_*.lease.*"))))
                assert not done(job)
                held.set()
            wait_as_ever(*given)

        monkeypatch.setattr(loop, "_wait_for", the_file_system_goes_on_when_nothing_else_does)
        assert loop.run() is Ending.DONE
    (claimed,) = claimed_meanwhile
    assert drawn_meanwhile == set(range(1, claimed + 1)), "all that was claimed, while not one was published"
    assert UNPUBLISHED <= claimed <= UNPUBLISHED + 3 < SHARDS, "and what was in hand when they were too many"
    assert_whole(job)


def test_a_frozen_task_is_done_without_it_and_throws_its_copy_away(make_job: MakeJob, start: Start) -> None:
    """Speculation: its lease is good for hours, but whoever is idle draws its shards a second time."""
    job = make_job("run.lease_ttl_s=3600")
    frozen = start(job, pause_s=0.02)
    wait_for(lambda: len(done(job)) >= 2, "two shards are done")
    frozen.send_signal(signal.SIGSTOP)
    assert run(job, LettersEngine(8, 0.0, None), speculate=True, linger_s=20.0) is Ending.DONE
    before = {shard: manifest.manifest_path(job.ws, 1, "cut", shard).read_bytes() for shard in range(SHARDS)}
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(PATIENCE_S) == 0
    assert {shard: manifest.manifest_path(job.ws, 1, "cut", shard).read_bytes() for shard in range(SHARDS)} == before
    assert_whole(job)
    names = {manifest.read(job.ws, 1, "cut", shard).path("samples.parquet").name for shard in range(SHARDS)}
    assert {path.name for path in job.folder.glob("*.samples.parquet")} == names


def test_a_task_that_has_finished_nothing_helps_before_it_would_leave(make_job: MakeJob, start: Start) -> None:
    """How long a shard takes is not known to it; half of the time that it would wait has to do."""
    job = make_job("run.lease_ttl_s=3600")
    frozen = start(job, capacity=1000, pause_s=0.1)
    wait_for(lambda: len(list(job.folder.rglob("shard_*.lease.*"))) == SHARDS, "it has all shards")
    frozen.send_signal(signal.SIGSTOP)
    assert run(job, LettersEngine(8, 0.0, None), speculate=True, linger_s=2.0) is Ending.DONE
    assert_whole(job)


def test_a_task_without_work_waits_a_while_and_starts_no_engine(make_job: MakeJob, start: Start) -> None:
    job = make_job("run.lease_ttl_s=3600")
    busy = start(job, capacity=1000, pause_s=0.1)
    wait_for(lambda: len(list(job.folder.rglob("shard_*.lease.*"))) == SHARDS, "it has all shards")

    def open_engine() -> Any:
        raise AssertionError("there is nothing for it to do")

    busy.send_signal(signal.SIGSTOP)
    assert run(job, LettersEngine(1, 0.0, None), open_engine=open_engine, linger_s=0.2) is Ending.OTHERS
    busy.send_signal(signal.SIGCONT)
    assert busy.wait(PATIENCE_S) == 0
    assert run(job, LettersEngine(1, 0.0, None), open_engine=open_engine) is Ending.DONE


# time


def test_nothing_is_begun_that_does_not_fit_before_the_limit(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job()
    caplog.set_level(logging.INFO)
    assert run(job, Watched(4, pause_s=0.02), deadline=Deadline(time.time() + 2.0)) is Ending.OUT_OF_TIME
    assert 1 <= len(done(job)) < SHARDS
    assert "no further shard is claimed: one takes up to" in caplog.text
    assert not record(job).lost_tokens, "what was begun is finished"
    assert run(job, LettersEngine(8, 0.0, None)) is Ending.DONE
    assert_whole(job)


def test_a_first_shard_is_always_tried(make_job: MakeJob) -> None:
    job = make_job()
    assert run(job, LettersEngine(1, 0.0, None), deadline=Deadline(time.time() - 60)) is Ending.OUT_OF_TIME
    assert 1 <= len(done(job)) < SHARDS


def test_a_task_that_is_out_of_time_says_so_with_its_exit_code(make_job: MakeJob, start: Start) -> None:
    job = make_job()
    task = start(job, {"HPC_RL_LEAVE_AT": f"{time.time() + 3.0:.0f}"}, pause_s=0.05)
    assert task.wait(PATIENCE_S) == 124
    assert 1 <= len(done(job)) < SHARDS


@pytest.mark.parametrize("left_s", [0.3, 3600.0])
def test_a_job_whose_whole_time_was_too_short_for_a_shard_is_an_error_and_not_tried_for_ever(
    make_job: MakeJob, left_s: float
) -> None:
    job = make_job()
    engine = Watched(1, 0.1)

    def tell_to_leave() -> None:
        if len(engine.filled) == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    engine.before_step = tell_to_leave
    with pytest.raises((NeverFits, SystemExit)) as raised:
        run(job, engine, deadline=Deadline(time.time() + left_s))
    assert not done(job)
    if left_s > 1:
        assert isinstance(raised.value, SystemExit), "told to leave before its time, as by a preemption"
    else:
        assert "lower sample.shard_size (raise sample.shards, in a recipe that has it)" in str(raised.value)


# what goes wrong


class Full:
    """Claims of which one shard's file is /dev/full: no space left on device."""

    def __init__(self, claims: Any, shard: int) -> None:
        self._claims, self._shard = claims, shard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claims, name)

    def next(self) -> Any:
        shard = self._claims.next()
        if shard is not None and shard.index == self._shard:
            output = shard.output

            def full(name: str) -> Path:
                path = output(name)
                if not path.exists():
                    path.symlink_to("/dev/full")
                return path

            shard.output = full
        return shard


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(make_job: MakeJob) -> None:
    job = make_job()
    with ExitStack() as stack, pytest.raises(WriteFailure, match=r"shard 5 is drawn, but cannot be .*No space left"):
        claims = Full(stack.enter_context(job.claims()), 5)
        stream(job, stack, LettersEngine(4, 0.0, None), claims=claims).run()
    assert 5 not in done(job)
    assert not list(job.folder.glob("shard_0005.*samples.parquet"))
    assert run(job, LettersEngine(8, 0.0, None)) is Ending.DONE
    assert_whole(job)


def test_a_commit_that_fails_when_its_manifest_is_there_leaves_the_output(make_job: MakeJob) -> None:
    """The folder's fsync comes after the link: what is published may not be touched any more."""
    job = make_job()

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with ExitStack() as stack, pytest.raises(WriteFailure, match="Input/output error"):
        claims = Slow(stack.enter_context(job.claims()), after_commit=fail)
        stream(job, stack, LettersEngine(4, 0.0, None), claims=claims).run()
    assert done(job) and published(job, sorted(done(job)))
    assert run(job, LettersEngine(8, 0.0, None)) is Ending.DONE
    assert_whole(job)


class Refusing(LettersEngine):
    """Says what it cannot do only when it comes to it, as a pool does."""

    def step(self) -> list[tuple[str, Any]]:
        key = next((key for key in self._rows if "s7r0-plain" in key), None)
        if key is not None:
            raise RequestRefused(key, "the prompt is too long")
        return super().step()


def test_a_prompt_that_is_refused_late_is_named_by_its_row_too(make_job: MakeJob) -> None:
    with pytest.raises(ValueError, match=r"row s7r0, role plain: .* the prompt is too long"):
        run(make_job(), Refusing(4, 0.0, None))


class Lossy(LettersEngine):
    """Forgets what it was asked."""

    def abort(self, keys: Collection[str]) -> None:
        self._rows.clear()


def test_an_engine_that_loses_requests_is_noticed(make_job: MakeJob) -> None:
    with pytest.raises(AssertionError, match="lost requests"):
        run(make_job(), Lossy(4, 0.0, None))


# everything at once


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_attempt_is_published_exactly_once_whatever_happens_to_the_tasks(
    make_job: MakeJob, start: Start, seed: int
) -> None:
    """Kills, freezes longer than leases live, notices to leave; tasks come and go until all is done."""
    lot = random.Random(seed)
    job = make_job("run.lease_ttl_s=1", "run.rounds=2")
    settings = {"pause_s": 0.02, "speculate": bool(seed % 2), "linger_s": 3.0}
    tasks = [start(job, **settings, together=3) for _ in range(3)]
    frozen: list[tuple[float, subprocess.Popen[str]]] = []
    kinds = [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]
    plan = [how for _ in range(3) for how in lot.sample(kinds, 3)]
    what: Counter[str] = Counter()
    orphans: dict[int, str] = {}  # shard → its last holder that was killed or frozen over it
    wait_for(lambda: all(in_hands_of(job, task) for task in tasks), "all three have a shard")
    deadline = time.monotonic() + PATIENCE_S
    while len(done(job)) < SHARDS:
        assert time.monotonic() < deadline, f"{len(done(job))} of {SHARDS} shards are done, after {what}"
        for until, task in [entry for entry in frozen if entry[0] < time.monotonic()]:
            task.send_signal(signal.SIGCONT)
            frozen.remove((until, task))
        tasks = [task for task in tasks if task.poll() is None]
        awake = [task for task in tasks if task not in [one for _, one in frozen]]
        if plan and awake:
            victim, how = lot.choice(awake), plan[0]
            victim.send_signal(signal.SIGSTOP)  # what it holds now, it still holds when the signal comes
            if holds := in_hands_of(job, victim):
                what[plan.pop(0).name] += 1
                orphans.update({} if how == signal.SIGTERM else holds)
            if holds and how == signal.SIGSTOP:
                frozen.append((time.monotonic() + lot.uniform(1.5, 3.0), victim))
            else:
                victim.send_signal(how if holds else signal.SIGCONT)
                victim.send_signal(signal.SIGCONT)
        while len(tasks) < 3:
            tasks.append(start(job, **settings))
        time.sleep(lot.uniform(0.1, 0.5) if what.total() >= len(kinds) else 0.0)
    for _, task in frozen:
        task.send_signal(signal.SIGCONT)
    for task in tasks:
        assert task.wait(PATIENCE_S) in (0, 143, -signal.SIGKILL, -signal.SIGTERM)
    assert_whole(job)
    makers = {shard: manifest.read(job.ws, 1, "cut", shard).metrics["task"] for shard in range(SHARDS)}
    what["taken over"] = sum(makers[shard] != holder for shard, holder in orphans.items())
    assert min(what[kind] for kind in ("SIGKILL", "SIGTERM", "SIGSTOP", "taken over")) > 0, what
    assert_another_round_draws_anew(job)


def in_hands_of(job: Job, task: subprocess.Popen[str]) -> dict[int, str]:
    """Shards that a task holds and nobody has done, with its token."""
    folder = leases_of(job.folder)
    listing = read_listing(folder)
    mine = {inode: token for inode, token in listing.holders.items() if pid_of(folder, token) == task.pid}
    held = {shard: mine[claimed.inode] for shard, claimed in listing.shards.items() if claimed.inode in mine}
    return {shard: token for shard, token in held.items() if shard not in done(job)}


def pid_of(folder: Path, token: str) -> int | None:
    """None when it has left meanwhile."""
    try:
        holder, _ = see(holder_path(folder, token))
    except FileNotFoundError:
        return None
    return holder.pid


def assert_another_round_draws_anew(job: Job) -> None:
    """The same rows, other seeds, other ids."""
    next_round = jobs.load(job.ws.root, 2, "cut")
    assert run(next_round, LettersEngine(8, 0.0, None)) is Ending.DONE
    ours, theirs = published(job), published(next_round)
    assert plain(theirs) == plain(sorted_(one_by_one(LettersSource(round=2))))
    assert {sample.row_id for sample in ours} == {sample.row_id for sample in theirs}
    for name in ("sample_id", "seed"):
        first, second = ({getattr(sample, name) for sample in samples} for samples in (ours, theirs))
        assert len(first) == len(ours) and not first & second
