"""`status`, `report` and `cancel` from outside of a run: what they show, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.reconcile import DRIVER_LEASE, Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import atomic, manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.lease import acquire
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.manifest import Manifest
from tests.waiting import PATIENCE_S

NOOP = source_root() / "benchmarks" / "noop.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A no-op run of two rounds, with nothing done yet."""
    return open_run(configs.load(NOOP, ["run.rounds=2"], {}, tmp_path / "run", cwd=tmp_path), NOOP)


def submitted(run: Run, stage: str, job_id: str, number: int = 1, round: int = 1, executor: str = "slurm") -> str:
    name = f"noop-r{round:02d}-{stage}-a{number}-abc"
    Ledger(run.ws).append(
        "intent", name=name, round=round, stage=stage, number=number, executor=executor, depends_on=[]
    )
    Ledger(run.ws).append("submitted", name=name, job_ids=[job_id])
    return name


def finish(run: Run, round: int, **metrics: float) -> None:
    for stage in run.graph.of_round(round):
        for shard in range(stage.shards if stage.has_work else 0):
            manifest.write(run.ws, Manifest(round, stage.name, shard, (), metrics=metrics))


def ended(run: Run, name: str, stage: str, outcome: str, error: str, at: float = 2.0) -> None:
    record = EndRecord(name, "7", 0, 0, "node1", outcome, 1, error, f"logs/round_01/{stage}/7-0.out", 1.0, at, 3.0, 4.0)
    atomic.write_json(run.ws.attempts_dir(1, stage) / f"{name}.end-7-0-{at}.json", asdict(record))


Type = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Type:
    """Types a command; `squeue` is what that one answers on this machine, None for no Slurm at all."""

    def type_command(module: str, *words: object, squeue: str | None = None, prefix: tuple[str, ...] = ()) -> Any:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, body in {"squeue": squeue, "scancel": f'echo "$*" >> {tmp_path}/cancelled'}.items():
            if squeue is not None and body is not None:
                path = folder / name
                path.write_text(f"#!/bin/bash\n{body}\n")
                path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return subprocess.run(
            [*prefix, sys.executable, "-m", module, *map(str, words)],
            cwd=source_root(),
            env={**os.environ, "PATH": f"{folder}:/bin" if squeue is not None else str(folder)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return type_command


def rows(text: str) -> dict[tuple[int, str], str]:
    """Lines of the table by round and stage."""
    lines = [line.split(maxsplit=2) for line in text.splitlines() if line[:5].strip().isdigit()]
    return {(int(line[0]), line[1]): line[2] for line in lines}


def stage_of(shown: dict[str, Any], round: int, stage: str) -> dict[str, Any]:
    found = next(r for r in shown["rounds"] if r["round"] == round)
    return next(s for s in found["stages"] if s["stage"] == stage)  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", ["hpc_rl.status", "hpc_rl.report", "hpc_rl.cancel"])
def test_a_folder_without_a_run_is_said(command: Type, tmp_path: Path, module: str) -> None:
    answer = command(module, tmp_path / "nowhere")
    assert answer.returncode == 2
    assert "nowhere holds no run" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_fresh_run_shows_what_is_to_come(command: Type, run: Run) -> None:
    shown = command("hpc_rl.status", run.ws.root).stdout
    assert f"{run.ws.root}: idle: nothing of it is queued; launch again to go on" in shown
    assert rows(shown)[1, "sample"].split() == ["not", "yet", "0/4"]
    assert (1, "advance") not in rows(shown)


def test_a_run_in_the_queue_shows_jobs_tasks_nodes_and_why_they_wait(command: Type, run: Run) -> None:
    sample, grade = submitted(run, "sample", "41"), submitted(run, "grade", "42")
    manifest.write(run.ws, Manifest(1, "sample", 2, ()))
    queue = f"41_[0-2]|PENDING|Resources||{sample}\n41_3|RUNNING|None|node3|{sample}\n42|PENDING|Dependency||{grade}"
    answer = command("hpc_rl.status", run.ws.root, squeue=f"cat <<END\n{queue}\nEND")
    assert "run: running" in answer.stdout
    assert rows(answer.stdout)[1, "sample"].split() == ["running", "1/4", "1", "3", "1", "41", "on", "node3"]
    assert rows(answer.stdout)[1, "grade"].split() == ["waiting", "0/1", "1", "1", "42", "(Dependency)"]
    shown = json.loads(command("hpc_rl.status", run.ws.root, "--json", squeue=f"cat <<END\n{queue}\nEND").stdout)
    sampling = stage_of(shown, 1, "sample")
    assert (sampling["tasks_running"], sampling["tasks_waiting"], sampling["shards_done"]) == (1, 3, 1)
    assert sampling["job_ids"] == ["41"]


def test_a_running_stage_shows_how_far_its_living_tasks_are(command: Type, run: Run) -> None:
    sample = submitted(run, "sample", "41")
    job = load(run.ws.root, 1, "sample")
    squeue = f"cat <<END\n41_[0-1]|RUNNING|None|node3|{sample}\nEND"
    with job.claims() as one, job.claims() as other, job.claims() as silent:
        one.progress(30, 100)
        other.progress(5, 20)
        assert silent.next()
        lost = job.folder / "tasks" / "0123456789ab.progress"
        lost.write_text('{"done": 9, "total": 9}')
        shown = command("hpc_rl.status", run.ws.root, squeue=squeue).stdout
        assert "round 1 sample: 35 of 120 in the shards under way, 2 tasks" in shown
    assert "under way" not in command("hpc_rl.status", run.ws.root, squeue=squeue).stdout


def test_the_last_error_is_shown_with_its_log(command: Type, run: Run) -> None:
    name = submitted(run, "sample", "41")
    ended(run, name, "sample", "error", "KeyError: 'early'", at=2.0)
    ended(run, name, "sample", "error", "KeyError: 'late'", at=3.0)
    shown = command("hpc_rl.status", run.ws.root, squeue="true").stdout
    assert rows(shown)[1, "sample"].startswith("failed")
    assert "round 1 sample: error: KeyError: 'late'" in shown
    assert f"log: {run.ws.root}/logs/round_01/sample/7-0.out" in shown


def test_a_job_that_left_no_word_is_called_lost(command: Type, run: Run) -> None:
    submitted(run, "sample", "41")
    shown = command("hpc_rl.status", run.ws.root, squeue="true").stdout
    assert rows(shown)[1, "sample"].startswith("failed")
    assert "lost: job 41 left no end record" in shown


def test_slurm_that_does_not_answer_is_said_and_the_rest_shown(command: Type, run: Run) -> None:
    submitted(run, "sample", "41")
    answer = command("hpc_rl.status", run.ws.root, squeue="echo 'squeue: error: Invalid user' >&2; exit 1")
    assert answer.returncode == 0
    assert "Slurm did not answer" in answer.stdout
    assert (1, "sample") in rows(answer.stdout)


def test_jobs_of_a_local_launcher_are_seen_from_another_process_while_it_lives(command: Type, run: Run) -> None:
    name = submitted(run, "sample", "local7.1", executor="local")
    queue = [{"name": name, "job_id": "local7.1_0", "state": "RUNNING", "reason": "", "node": "here"}]
    lease = acquire(run.ws.lease_folder, DRIVER_LEASE, 60.0)
    assert lease is not None
    with lease:
        atomic.write_json(run.ws.lease_folder / "local_queue.json", queue)
        assert rows(command("hpc_rl.status", run.ws.root).stdout)[1, "sample"].startswith("running")
    assert not rows(command("hpc_rl.status", run.ws.root).stdout)[1, "sample"].startswith("running")


@pytest.mark.parametrize("event", ["paused", "stopped"])
def test_a_run_that_stands_still_says_why(command: Type, run: Run, event: str) -> None:
    Ledger(run.ws).append(event, why="for a good reason")
    assert f"run: {event}: for a good reason" in command("hpc_rl.status", run.ws.root).stdout


def test_a_finished_run_is_finished_whatever_its_state_file_says(command: Type, run: Run) -> None:
    finish(run, 1)
    finish(run, 2)
    run.ws.state_path.write_text("rubbish")
    answer = command("hpc_rl.status", run.ws.root, "--watch")
    assert answer.returncode == 0, "and --watch ends by itself"
    assert "run: finished" in answer.stdout
    assert all(row.startswith("done") for row in rows(answer.stdout).values())


def test_somebody_who_may_only_read_can_look_and_looking_changes_nothing(command: Type, run: Run) -> None:
    submitted(run, "sample", "41")
    lease = acquire(run.ws.lease_folder, DRIVER_LEASE, 60.0)
    assert lease is not None
    with lease:
        paths = [run.ws.root, *run.ws.root.rglob("*")]
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        # permissions do not hinder root, unless it gives that capability away (capabilities(7))
        prefix = ("/usr/bin/setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
        answer = command("hpc_rl.status", run.ws.root, squeue="true", prefix=prefix)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert set(run.ws.root.rglob("*")) | {run.ws.root} == set(paths)
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths} == before
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


# report and cancel


def test_a_report_sums_up_the_cost_of_all_attempts_lost_ones_included(command: Type, run: Run) -> None:
    for number, at in ((1, 2.0), (2, 5.0)):
        name = submitted(run, "sample", "41", number)
        ended(run, name, "sample", "killed", "", at)
    finish(run, 1)
    shown = command("hpc_rl.report", run.ws.root).stdout
    assert re.search(r"sample +5 s +6 s +8 s", shown)


def test_cancel_pauses_the_run_and_cancels_its_jobs_by_their_names_alone(
    command: Type, run: Run, tmp_path: Path
) -> None:
    sample, grade = submitted(run, "sample", "41"), submitted(run, "grade", "42")
    queue = f"41_[0-3]|PENDING|None||{sample}\n42|PENDING|None||{grade}\n43|RUNNING|None||somebody-elses"
    answer = command("hpc_rl.cancel", run.ws.root, squeue=f"cat <<END\n{queue}\nEND")
    assert answer.returncode == 0, answer.stderr
    assert "cancelled 2 jobs: 41, 42" in answer.stdout
    assert sorted((tmp_path / "cancelled").read_text().splitlines()) == sorted(
        f"--quiet --name={name}" for name in (sample, grade)
    )
    assert Ledger(run.ws).history().paused == "cancelled by the user"


def test_cancel_marks_the_run_paused_even_when_slurm_does_not_answer(command: Type, run: Run) -> None:
    submitted(run, "sample", "41")
    answer = command("hpc_rl.cancel", run.ws.root, squeue="echo 'squeue: error: Invalid user' >&2; exit 1")
    assert answer.returncode == 2
    assert "The run is marked paused" in answer.stderr
    assert Ledger(run.ws).history().paused
