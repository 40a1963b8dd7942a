"""Claims: each shard in one hand at a time, two hands only on purpose, and exactly one manifest whatever happens."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.claims import Claims
from hpc_rl.orchestrate.job import Job, Shard
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.digest import digest_of_outputs, digest_path
from hpc_rl.run.lease import acquire
from hpc_rl.run.manifest import Manifest, Manifests, Output
from hpc_rl.run.presence import Holder
from hpc_rl.run.shard_leases import leases_of, progress_path, read_listing, shard_lease_path
from tests.full_disk import full_disk
from tests.orchestrate import operations
from tests.orchestrate.claims_body import content, job_of
from tests.waiting import PATIENCE_S, wait_for

MakeJob = Callable[..., Job]
MakeClaims = Callable[[Job], Claims]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """The job of a stage with some number of shards."""

    def make(shards: int, *overrides: str) -> Job:
        file = tmp_path / "run.yaml"
        file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: claims, rounds: 1}\n")
        run = open_run(configs.load(file, overrides, {}, tmp_path / "run", cwd=tmp_path), file)
        return job_of(run.ws.root, shards)

    return make


@pytest.fixture
def claims_of() -> Iterator[MakeClaims]:
    """Claims of a task; closed at the end of the test."""
    made = []

    def make(job: Job) -> Claims:
        made.append(job.claims())
        return made[-1]

    yield make
    for claims in made:
        claims.close()


LISTED: list[str] | None = None
OPENED: list[str] | None = None


def note(event: str, arguments: tuple[object, ...]) -> None:
    if LISTED is not None and event in ("os.listdir", "os.scandir"):
        LISTED.append(str(arguments[0]))
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(note)  # for good; it notes nothing while there is no list


def must(shard: Shard | None) -> Shard:
    assert shard is not None
    return shard


def patiently(ask: Callable[[], Shard | None]) -> Shard:
    """What `ask` gives when it gives something: claims look at others with pauses."""
    return must(wait_for(ask, "a shard"))


def finish(shard: Shard) -> bool:
    path = shard.output("lines.txt")
    path.write_text(content(shard.index))
    return shard.commit([path], made_from={})


def freeze(shard: Shard) -> None:
    """As if the heart of the shard's holder had last beaten long ago. It beats again, a fifth of its ttl later."""
    assert shard.lease is not None
    os.utime(shard.lease.path, (0, 0))


def assert_whole(job: Job) -> None:
    """Every shard is done, and its output is what it must be."""
    for index, done in enumerate(Manifests(job.ws, 1, "cut", job.stage.shards)):
        assert done.shard == index
        assert done.path("lines.txt").read_text() == content(index)


# free shards


def test_every_shard_is_handed_out_once(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(50)
    tasks = [claims_of(job) for _ in range(3)]
    handed: list[int] = []
    while shards := [shard for task in tasks if (shard := task.next())]:
        handed += [shard.index for shard in shards]
    assert sorted(handed) == list(range(50))
    assert not tasks[0].all_done()
    assert tasks[0].left() == 50


def test_tasks_begin_at_different_shards(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1000)
    first = {must(claims_of(job).next()).index for _ in range(10)}
    assert len(first) == 10
    assert max(first) - min(first) > 100


def test_shards_that_were_done_before_are_not_handed_out(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(4)
    for shard in (0, 2, 3):
        manifest.write(job.ws, Manifest(1, "cut", shard, ()))
    claims = claims_of(job)
    assert must(claims.next()).index == 1
    assert claims.next() is None
    assert claims.left() == 1


def test_what_is_not_done_is_free_at_once_when_its_holder_leaves(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(6, "run.lease_ttl_s=3600")
    first, second = claims_of(job), claims_of(job)
    held = [must(first.next()) for _ in range(6)]
    assert finish(held[0]) and second.next() is None
    first.close()
    taken = [patiently(second.next) for _ in range(5)]
    assert {shard.index for shard in taken} == {shard.index for shard in held[1:]}
    assert all(finish(shard) for shard in taken)
    assert second.all_done()
    assert_whole(job)


def test_one_shard_can_be_given_back_while_others_are_kept(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(2, "run.lease_ttl_s=3600")
    first, second = claims_of(job), claims_of(job)
    kept, given = must(first.next()), must(first.next())
    given.abandon()
    given.abandon()
    taken = patiently(second.next)
    assert (taken.index, second.next()) == (given.index, None)
    assert given.lease is not None and given.lease.lost and not given.still_ours()
    assert taken.output("x") != given.output("x")
    assert kept.still_ours() and taken.still_ours()
    taken.abandon()
    again = patiently(first.next)  # also by the one that gave it back
    assert again.index == given.index and again.output("x") != given.output("x")


def test_a_shard_that_is_done_is_not_given_back(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1)
    claims = claims_of(job)
    shard = must(claims.next())
    assert finish(shard) and claims.all_done()
    before = sorted(os.listdir(leases_of(job.folder)))
    shard.abandon()
    assert sorted(os.listdir(leases_of(job.folder))) == before


# holders that are gone


def test_shards_of_a_frozen_task_are_taken_over_and_it_finds_out(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(3, "run.lease_ttl_s=3600")
    frozen, other = claims_of(job), claims_of(job)
    held = [must(frozen.next()) for _ in range(3)]
    assert frozen.overtaken(held) == []
    freeze(held[0])
    taken = [patiently(other.next) for _ in range(2)]
    indices = {shard.index for shard in taken}
    # a heart that stood still for a whole ttl looks at once; here it is the pause between two looks that ends
    frozen._board.looked = -1e9
    assert {shard.index for shard in frozen.overtaken(held)} == indices
    assert all(finish(shard) for shard in taken)
    lost = [finish(shard) for shard in held if shard.index in indices]
    assert lost == [False, False]
    assert finish(next(shard for shard in held if shard.index not in indices)), "nobody else has it: it still counts"
    assert_whole(job)
    assert len(list(job.folder.glob("*.lines.txt"))) == 3, "the copies that came late are thrown away"


def test_a_task_that_was_taken_for_dead_can_go_on_claiming(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(2, "run.lease_ttl_s=3600")
    frozen, other = claims_of(job), claims_of(job)
    held = must(frozen.next())
    freeze(held)
    assert {must(other.next()).index, patiently(other.next).index} == {0, 1}
    other.close()
    assert patiently(frozen.next).index == 1 - held.index
    third = claims_of(job)
    assert patiently(third.next).index == held.index, "what it had before is lost"
    assert third.next() is None, "what it claimed afterwards is not"


def test_one_that_finds_a_holder_dead_frees_its_shards_for_all(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(2, "run.lease_ttl_s=3600")
    frozen, third, other = claims_of(job), claims_of(job), claims_of(job)
    held = [must(frozen.next()), must(frozen.next())]
    assert third.next() is None and third.peers() == 3
    freeze(held[0])
    patiently(other.next)
    assert other.peers() == 2
    assert patiently(third.next), "although it saw the frozen one alive a moment ago"
    assert len(read_listing(leases_of(job.folder)).holders) == 2


def test_a_task_that_cannot_say_who_it_is_leaves_nothing_behind(make_job: MakeJob) -> None:
    job = make_job(1)
    with full_disk(), pytest.raises(OSError):
        job.claims()
    assert not os.listdir(leases_of(job.folder))


def test_the_empty_file_of_a_task_that_died_early_stops_nobody_and_goes(
    make_job: MakeJob, claims_of: MakeClaims
) -> None:
    job = make_job(2, "run.lease_ttl_s=0.2")
    claims = claims_of(job)
    empty = leases_of(job.folder) / ".holder-0123456789ab"
    empty.touch()
    held = [must(claims.next()), must(claims.next())]
    wait_for(lambda: claims.peers() == 1, "the end of the empty one")
    assert not empty.exists()
    assert all(finish(shard) for shard in held)


def test_dead_tasks_are_no_peers(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(10, "run.lease_ttl_s=3600")
    claims = claims_of(job)
    holder = vars(Holder.this_process()) | {"host": "another"}
    folder = leases_of(job.folder)
    for number in range(100):
        token = f"{number * 0x28F5C28F5C2:012x}"  # spread over all tokens
        (folder / f".holder-{token}").write_text(json.dumps(holder | {"token": token}))
        if number >= 40:
            os.utime(folder / f".holder-{token}", (0, 0))
    assert 33 <= claims.peers() <= 101
    for token in read_listing(folder).holders.values():
        if token != claims.token:
            os.utime(folder / f".holder-{token}", (0, 0))
    claims.close()
    assert must((restarted := claims_of(job)).next())
    assert restarted.peers() == 1, "at once, whatever they left"
    assert len(read_listing(folder).holders) == 1


def test_hearts_are_not_asked_while_there_are_shards_that_nobody_ever_claimed(
    make_job: MakeJob, claims_of: MakeClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(20, "run.lease_ttl_s=3600")
    frozen = [must(claims_of(job).next()) for _ in range(10)]
    for shard in frozen:
        freeze(shard)
    claims = claims_of(job)
    opened: list[str] = []
    monkeypatch.setitem(globals(), "OPENED", opened)
    claims._look()
    assert len({must(claims.next()).index for _ in range(10)} - {shard.index for shard in frozen}) == 10
    assert not [path for path in opened if ".holder-" in path]
    assert {patiently(claims.next).index for _ in range(10)} == {shard.index for shard in frozen}


def test_a_stage_is_at_work_while_a_living_task_holds_an_undone_shard(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(2, "run.lease_ttl_s=3600")
    assert not gate.is_at_work(job.ws, job.stage, 3600)
    claims = claims_of(job)
    assert not gate.is_at_work(job.ws, job.stage, 3600)
    shard = must(claims.next())
    assert gate.is_at_work(job.ws, job.stage, 3600)
    assert finish(shard)
    assert not gate.is_at_work(job.ws, job.stage, 3600)
    freeze(must(claims.next()))
    assert not gate.is_at_work(job.ws, job.stage, 3600)


# second workers


def test_a_shard_has_at_most_one_copy_and_the_first_manifest_stands(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1)
    slow, second, third = claims_of(job), claims_of(job), claims_of(job)
    original = must(slow.next())
    copy = must(second.duplicate())
    assert copy.index == original.index and copy.output("x") != original.output("x")
    assert second.duplicate() is None and third.duplicate() is None and slow.duplicate() is None
    assert finish(copy)
    assert not finish(original)
    assert_whole(job)
    assert len(list(job.folder.glob("*.lines.txt"))) == 1
    assert slow.all_done() and second.all_done()


def test_a_copy_that_is_given_back_can_be_made_again(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1)
    slow, second, third = claims_of(job), claims_of(job), claims_of(job)
    must(slow.next())
    must(second.duplicate()).abandon()
    assert finish(must(third.duplicate()))


@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_a_shard_whose_copier_is_gone_can_be_copied_again(make_job: MakeJob, claims_of: MakeClaims, how: str) -> None:
    job = make_job(1, "run.lease_ttl_s=3600")
    slow, second, third = claims_of(job), claims_of(job), claims_of(job)
    original = must(slow.next())
    copy = must(second.duplicate())
    assert claims_of(job).duplicate() is None
    if how == "dies":
        freeze(copy)
    else:
        second.close()
    again = patiently(third.duplicate)
    assert again.output("x") not in (copy.output("x"), original.output("x"))
    assert claims_of(job).duplicate() is None, "one at a time"
    assert finish(again) and not finish(original)
    assert_whole(job)


def test_a_shard_whose_holder_dies_is_left_to_its_copy(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1, "run.lease_ttl_s=3600")
    slow, second, third = claims_of(job), claims_of(job), claims_of(job)
    original = must(slow.next())
    copy = must(second.duplicate())
    freeze(original)
    assert third.next() is None
    second.close()
    assert finish(patiently(third.next))
    assert not finish(copy) and not finish(original)


def test_the_task_with_the_most_left_is_helped_first(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(7)
    quick, slow = claims_of(job), claims_of(job)
    assert must(quick.next())
    of_the_slow = {must(slow.next()).index for _ in range(6)}
    helper = claims_of(job)
    assert {must(helper.duplicate()).index for _ in range(5)} < of_the_slow


def test_progress_that_cannot_be_written_is_said_once_and_loses_nothing(
    make_job: MakeJob, claims_of: MakeClaims, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpc_rl.orchestrate.progress_note.EVERY_S", 0.0)
    job = make_job(1)
    claims = claims_of(job)
    shard = must(claims.next())
    with full_disk():
        claims.progress(0, 2)
        claims.progress(1, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "File too large" in caplog.text and claims.token in caplog.text
    claims.progress(2, 2)
    assert atomic.read_json(progress_path(job.folder, claims.token)) == {"done": 2, "total": 2}
    assert finish(shard)
    claims.close()
    assert not list((job.folder / "tasks").iterdir())


def test_progress_is_written_over_in_place(
    make_job: MakeJob, claims_of: MakeClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_rl.orchestrate.progress_note.EVERY_S", 0.0)
    job = make_job(1)
    claims = claims_of(job)
    note = progress_path(job.folder, claims.token)
    claims.progress(998, 1000)
    first = note.stat().st_ino
    for done, total in [(0, 7), (1_000_000, 2_000_000), (3, 20)]:
        claims.progress(done, total)
        assert atomic.read_json(note) == {"done": done, "total": total}
    assert note.stat().st_ino == first, "the file is the same one"


def test_two_threads_may_claim_and_commit(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(120)
    claims = claims_of(job)
    claimed: list[Shard] = []
    publisher = threading.Thread(target=lambda: [finish(shard) for shard in iter(lambda: take(claimed), None)])

    def take(shards: list[Shard]) -> Shard | None:
        while not shards:
            time.sleep(0.001)
        shard = shards.pop()
        return None if shard.index < 0 else shard

    publisher.start()
    while shard := claims.next():
        claimed.append(shard)
    wait_for(lambda: not claimed, "the last commit")
    claimed.append(Shard(job, -1, None))
    publisher.join()
    assert claims.all_done()
    assert_whole(job)


# what people and servers do


@pytest.mark.parametrize("who", ["the same task", "another task"])
def test_a_shard_whose_manifest_was_removed_is_done_again(make_job: MakeJob, claims_of: MakeClaims, who: str) -> None:
    job = make_job(3)
    claims = claims_of(job)
    for _ in range(3):
        assert finish(must(claims.next()))
    assert claims.all_done()
    manifest.manifest_path(job.ws, 1, "cut", 1).unlink()
    if who == "another task":
        claims.close()
        claims = claims_of(job)
    again = patiently(claims.next)
    assert again.index == 1 and finish(again)
    assert claims.all_done()
    assert_whole(job)


def test_a_link_whose_answer_was_lost_is_ours_all_the_same(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(1)
    claims = claims_of(job)
    # as if an NFS server had made the link and been asked a second time (link(2), BUGS)
    os.link(leases_of(job.folder) / f".holder-{claims.token}", shard_lease_path(leases_of(job.folder), 0, 1))
    shard = patiently(claims.next)
    assert shard.lease is not None and shard.lease.generation == 1
    assert finish(shard)


def test_a_file_may_have_fewer_names_than_there_are_shards(make_job: MakeJob, claims_of: MakeClaims) -> None:
    job = make_job(3)
    claims = claims_of(job)
    file = leases_of(job.folder) / f".holder-{claims.token}"
    names = job.folder / "names"
    names.mkdir()
    most = min(os.pathconf(file, "PC_LINK_MAX"), 66_000)  # ext4: 65 000
    for number in range(most - file.stat().st_nlink - 1):
        os.link(file, names / str(number))
    held = [must(claims.next()) for _ in range(3)]
    other = claims_of(job)
    assert other.next() is None, "all names say that their holder lives"
    assert all(shard.still_ours() for shard in held)
    claims.close()
    assert {patiently(other.next).index for _ in range(3)} == {0, 1, 2}
    shutil.rmtree(names)


# many processes


SHARDS = 80
Task = subprocess.Popen[bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Task]]:
    """Starts tasks of their own that work on `cut`, and ends those that are left."""
    started: list[Task] = []

    def start_one(job: Job, *options: str, before: Sequence[str] = ()) -> Task:
        body = ["-m", "tests.orchestrate.claims_body", str(job.ws.root), str(job.stage.shards), *options]
        started.append(subprocess.Popen([*before, sys.executable, *body], cwd=source_root()))
        return started[-1]

    yield start_one
    for task in started:
        task.kill()
        task.wait()


@pytest.mark.parametrize("seed", range(3))
def test_every_shard_has_one_manifest_after_any_kills_stalls_take_overs_and_copies(
    make_job: MakeJob, start: Callable[..., Task], seed: int
) -> None:
    job, chance = make_job(SHARDS, "run.lease_ttl_s=0.5"), random.Random(seed)
    numbers = itertools.count()

    def another() -> Task:
        return start(job, "--restless", f"{seed}-{next(numbers)}", "--seconds", "0.05")

    tasks = [another() for _ in range(4)]
    stalled: dict[int, float] = {}  # place in `tasks` → when it goes on
    what: Counter[str] = Counter()
    before = 0
    deadline = time.monotonic() + PATIENCE_S
    while (done := len(manifest.done_shards(job.ws, 1, "cut"))) < SHARDS:
        assert time.monotonic() < deadline, f"lost shards, after {what}"
        time.sleep(chance.uniform(0.1, 0.4))
        for place in [place for place, until in stalled.items() if until < time.monotonic()]:
            tasks[place].send_signal(signal.SIGCONT)
            del stalled[place]
        if done == before:  # on a slow machine tasks would all be killed while they begin
            continue
        before = done
        place = chance.randrange(len(tasks))
        if not what["kills"] or (what["stalls"] and chance.random() < 0.3):  # one of each comes first, for certain
            tasks[place].kill()
            stalled.pop(place, None)
            tasks[place] = another()
            what["kills"] += 1
        elif place not in stalled and len(stalled) < 3:
            tasks[place].send_signal(signal.SIGSTOP)
            least = 0.2 if what["stalls"] else 1.5  # for less than the ttl, and for much more
            stalled[place] = time.monotonic() + chance.uniform(least, 2.5)
            what["stalls"] += 1
    for place in stalled:
        tasks[place].send_signal(signal.SIGCONT)
    assert [task.wait(PATIENCE_S) for task in tasks] == [0] * 4
    assert_whole(job)
    first = Counter((job.ws.root / "committed").read_text().split())
    assert max(first.values()) == 1, "two were told that theirs is the one"
    names = os.listdir(leases_of(job.folder))
    what["take-overs"] = sum(name.endswith(".lease.0002") for name in names)
    what["copies"] = sum(name.endswith(".copy") for name in names)
    assert min(what[kind] for kind in ("kills", "stalls", "take-overs")) > 0, what
    # what was thrown away is gone, but for the files of the killed
    assert len(list(job.folder.glob("*.lines.txt"))) <= SHARDS + 3 * what["kills"]


def test_a_shard_costs_at_most_eight_metadata_operations_and_three_inodes(
    make_job: MakeJob, start: Callable[..., Task], tmp_path: Path
) -> None:
    if reason := operations.why_not():
        assert os.environ.get("CI", "") not in ("1", "true", "True"), reason
        pytest.skip(reason)
    job = make_job(64)
    traces = [tmp_path / f"trace-{number}" for number in range(4)]
    tasks = [start(job, "--hold", "2", before=operations.traced(trace)) for trace in traces]
    assert [task.wait(PATIENCE_S) for task in tasks] == [0] * 4
    assert_whole(job)
    found = sum((operations.count(trace, job.folder) for trace in traces), Counter[str]())
    assert found["link"] >= 2 * 64, "it counts"
    assert found.total() <= 8 * 64, f"{found.total() / 64:.1f} a shard: {found}"
    inodes = {path.stat().st_ino for path in job.folder.rglob("*")}
    assert len(inodes) <= 3 * 64, f"{len(inodes) / 64:.1f} a shard"


# ten thousand shards


def test_the_inputs_of_a_task_are_one_digest_that_one_task_reads_for_all(make_job: MakeJob) -> None:
    job = make_job(500)
    for shard in range(500):
        manifest.write(job.ws, Manifest(1, "cut", shard, (Output(f"{shard}", 1, f"{shard:064}"),)))
    inputs = Manifests(job.ws, 1, "cut", 500)
    with ThreadPoolExecutor(4) as threads:
        (digest,) = set(threads.map(digest_of_outputs, [inputs] * 4))
    lines = "".join(f"{shard:064}  {shard}\n" for shard in range(500))
    assert digest == hashlib.sha256(lines.encode()).hexdigest()
    manifest.manifest_path(job.ws, 1, "cut", 7).unlink()
    assert digest_of_outputs(inputs) == digest, "the manifests are not read again"
    with job.claims() as claims:
        again = patiently(claims.next)
        assert again.index == 7 and finish(again)
    assert digest_of_outputs(inputs) != digest_of_outputs(Manifests(job.ws, 1, "cut", 0))


def test_who_waits_for_the_digest_does_not_list_the_leases_of_ten_thousand_shards(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(500)
    inputs = Manifests(job.ws, 1, "cut", 500)  # of which none is there: they are not to be read
    path = digest_path(job.folder)
    listings: list[str] = []
    lease = acquire(path.parent, "outputs", 60.0)
    assert lease is not None
    with ThreadPoolExecutor(1) as threads, lease:
        monkeypatch.setitem(globals(), "LISTED", listings)
        digest = threads.submit(digest_of_outputs, inputs)
        wait_for(lambda: len(listings) >= 2 or digest.done(), "two looks")
        assert not digest.done()
        atomic.create_exclusive(path, "what another task found\n")
        assert digest.result(PATIENCE_S) == "what another task found"
    assert {folder for folder in listings if folder.startswith(str(job.ws.root))} == {str(path.parent)}
