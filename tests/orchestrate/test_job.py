"""The frame of job bodies, with real processes: shards are shared, taken over from the dead, and done exactly once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate import job as jobs
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.manifest import Manifest
from hpc_rl.run.shard_leases import leases_of, read_listing
from tests.orchestrate.shards_body import LINES
from tests.orchestrate.shards_recipe import SHARDS
from tests.waiting import PATIENCE_S, wait_for

CONFIG = """\
recipe: tests.orchestrate.shards_recipe
run: {name: shards, rounds: 1, seed: 3, gate_patience_s: 0.2}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(*overrides: str) -> Run:
        file = tmp_path / "shards.yaml"
        file.write_text(CONFIG)
        return open_run(configs.load(file, overrides, {}, tmp_path / "run", cwd=tmp_path), file)

    return make


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts bodies, each as a process of its own, and ends those that are left."""
    started = []

    def start_one(run: Run, stage: str = "cut", **environment: str) -> subprocess.Popen[str]:
        body = [sys.executable, "-m", "tests.orchestrate.shards_body", "--workspace", str(run.ws.root), "--round", "1"]
        started.append(
            subprocess.Popen(
                [*body, "--stage", stage],
                cwd=source_root(),
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], word: str) -> list[str]:
    """The words of the first line that begins with `word`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.split()
    raise AssertionError(f"it ended without saying {word!r}")


def commits(process: subprocess.Popen[str]) -> list[tuple[int, bool]]:
    """The shards that a process committed, once it has ended; and whether it was the first to."""
    words = [line.split() for line in process.communicate(timeout=PATIENCE_S)[0].splitlines()]
    return [(int(line[1]), line[2] == "True") for line in words if line[0] == "committed"]


def assert_whole(run: Run) -> None:
    """Every shard is there once, with all of its lines and nothing else."""
    assert manifest.done_shards(run.ws, 1, "cut") == set(range(SHARDS))
    for shard in range(SHARDS):
        stored = manifest.read(run.ws, 1, "cut", shard)
        assert stored.path("lines.txt").read_text() == "".join(f"{shard} {line}\n" for line in range(LINES))


def outputs(run: Run) -> list[str]:
    return sorted(path.name for path in run.ws.stage_dir(1, "cut").glob("*.lines.txt"))


# sharing


def test_two_processes_share_the_shards_without_loss_or_double(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    two = [start(run, MODE="hold"), start(run, MODE="hold")]
    first = [int(wait_for_line(process, "middle")[1]) for process in two]
    claimed = read_listing(leases_of(run.ws.stage_dir(1, "cut"))).shards
    assert set(claimed) == set(first) and len(claimed) == 2, "the work is claimed one by one, not handed out"
    for process in two:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    done = [commits(process) for process in two]
    assert [process.returncode for process in two] == [0, 0]
    assert_whole(run)
    assert Counter(shard for one in done for shard, _ in one) == Counter(range(SHARDS))
    assert all(won for one in done for _, won in one)
    assert len(outputs(run)) == SHARDS


def test_a_shard_whose_worker_is_killed_in_the_middle_is_taken_over(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    victim = start(run, MODE="hang")
    shard = int(wait_for_line(victim, "middle")[1])
    victim.kill()
    other = start(run, SECONDS="0.02")
    done = commits(other)
    assert other.returncode == 0
    assert_whole(run)
    assert (shard, True) in done
    assert len(outputs(run)) == SHARDS + 1, "what the victim left lies beside it, under a name of its own"


def test_a_worker_waits_for_one_that_dies_later(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    victim = start(run, MODE="hang")
    wait_for_line(victim, "middle")
    other = start(run, SECONDS="0.01")
    wait_for(lambda: len(manifest.done_shards(run.ws, 1, "cut")) == SHARDS - 1, "the others' shards", of=other)
    assert other.poll() is None
    victim.kill()
    victim.wait()
    other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 0
    assert_whole(run)


def test_a_frozen_worker_loses_its_shard_and_its_copy_is_thrown_away(
    make_run: Callable[..., Run], start: Start
) -> None:
    run = make_run("run.lease_ttl_s=1")
    frozen = start(run, MODE="hold")
    shard = int(wait_for_line(frozen, "middle")[1])
    frozen.send_signal(signal.SIGSTOP)
    other = start(run, SECONDS="0.01")
    assert (shard, True) in commits(other)
    before = manifest.manifest_path(run.ws, 1, "cut", shard).read_bytes()
    frozen.send_signal(signal.SIGCONT)
    output, _ = frozen.communicate("go on\n", timeout=PATIENCE_S)
    assert f"committed {shard} False" in output
    assert frozen.returncode == 0
    assert manifest.manifest_path(run.ws, 1, "cut", shard).read_bytes() == before
    assert_whole(run)
    assert len(outputs(run)) == SHARDS


@pytest.mark.parametrize(("stage", "code"), [("cut", 0), ("join", 75)])
def test_a_worker_does_not_stay_for_ever_when_all_is_in_other_hands(
    make_run: Callable[..., Run], start: Start, stage: str, code: int
) -> None:
    run = make_run("run.linger_s=0.5")
    done = SHARDS - 1 if stage == "cut" else SHARDS
    for shard in range(done):
        manifest.write(run.ws, Manifest(1, "cut", shard, ()))
    left = done if stage == "cut" else 0
    with jobs.load(run.ws.root, 1, stage).claims() as claims:
        shard = claims.next()
        assert shard is not None and shard.index == left
        process = start(run, stage)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert "1 shards are in other hands" in output


# leaving


def test_a_worker_that_is_told_to_leave_gives_its_shard_back(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    worker = start(run, MODE="hang")
    shard = int(wait_for_line(worker, "middle")[1])
    worker.terminate()
    worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 128 + signal.SIGTERM
    with jobs.load(run.ws.root, 1, "cut").claims() as claims:
        assert shard in {free.index for free in iter(claims.next, None)}


def test_a_worker_that_fails_gives_its_shard_back(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    worker = start(run, MODE="raise")
    shard = int(wait_for_line(worker, "middle")[1])
    worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 1
    with jobs.load(run.ws.root, 1, "cut").claims() as claims:
        assert shard in {free.index for free in iter(claims.next, None)}


def test_progress_is_shown_while_a_task_is_at_work_and_gone_when_it_leaves(
    make_run: Callable[..., Run], start: Start
) -> None:
    run = make_run()
    worker = start(run, MODE="hold")
    wait_for_line(worker, "middle")
    (progress,) = (run.ws.stage_dir(1, "cut") / "tasks").glob("*.progress")
    assert atomic.read_json(progress)["total"] == LINES
    worker.communicate("go on\n", timeout=PATIENCE_S)
    assert not progress.exists()


# the door


def test_a_body_whose_stage_is_done_has_nothing_to_do(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    for shard in range(SHARDS):
        manifest.write(run.ws, Manifest(1, "cut", shard, ()))
    process = start(run)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "round 1 cut is done already" in output


def test_a_body_whose_inputs_are_missing_is_blocked_and_names_them(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    process = start(run, "join")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75
    assert "round 1 join is blocked: round 1 cut is not there" in output


def test_an_unknown_stage_is_answered_with_those_there_are(make_run: Callable[..., Run]) -> None:
    run = make_run()
    with pytest.raises(SystemExit, match=r"no stage 'cutt' in round 1 of .*: cut, join, advance"):
        jobs.load(run.ws.root, 1, "cutt")
    with pytest.raises(SystemExit, match="rounds are 0 to 1"):
        jobs.load(run.ws.root, 7, "cut")


def test_a_folder_without_a_run_is_answered_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no run .*hpc_rl\.launch CONFIG .*--init"):
        jobs.load(tmp_path, 1, "cut")


# what is written down


def test_a_manifest_says_from_what_its_outputs_were_made(make_run: Callable[..., Run], start: Start) -> None:
    run = make_run()
    commits(start(run, SECONDS="0", HPC_RL_CODE="c0de", HPC_RL_ATTEMPT="shards-r01-cut-a1-x", HPC_RL_JOB_ID="7_1"))
    commits(start(run, "join"))
    cut, join = manifest.read(run.ws, 1, "cut", 3), manifest.read(run.ws, 1, "join", 0)
    assert (cut.attempt, cut.job_id, cut.metrics) == ("shards-r01-cut-a1-x", "7_1", {"lines": LINES})
    assert cut.made_from["code"] == "c0de"
    assert cut.made_from["run_seed"] == 3
    assert cut.made_from["config"] == configs.config_hash(run.config)
    assert cut.started <= cut.ended
    made = [manifest.read(run.ws, 1, "cut", shard).outputs[0] for shard in range(SHARDS)]
    lines = "".join(f"{output.sha256}  {output.path}\n" for output in made)  # as sha256sum(1) prints them
    assert join.made_from["inputs"] == {"round_01/cut": hashlib.sha256(lines.encode()).hexdigest()}


def test_ranks_that_follow_get_the_shards_without_a_lease_and_cannot_commit(make_run: Callable[..., Run]) -> None:
    job = jobs.load(make_run().ws.root, 1, "join")
    shards = list(job.shards(leader=False))
    assert [shard.index for shard in shards] == [0]
    with pytest.raises(AssertionError, match="only the holder of the lease commits"):
        shards[0].commit([], made_from={})
    assert not job.folder.exists(), "and they leave no trace"
