"""The entry process of a job, run as executors run it, around bodies that end in every way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_rl.cluster.entry import RESTARTS_IN_PLACE, EndRecord, Spec, load_spec
from hpc_rl.cluster.queries import clean_environment
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.reconcile import end_records
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.manifest import Manifest
from tests.waiting import PATIENCE_S, is_alive, wait_for


def spec(tmp_path: Path, body: str | tuple[str, ...], **more: object) -> Spec:
    command = (sys.executable, "-u", "-c", body) if isinstance(body, str) else body
    plain = Spec("run-r01-sample-a1-abc", str(tmp_path / "run"), 1, "sample", 2, "local", command, {}, grace_s=20.0)
    made = replace(plain, **more)  # type: ignore[arg-type]
    made.save()
    return made


def environment(**more: str) -> dict[str, str]:
    return {**clean_environment(), "HPC_RL_JOB_ID": "12_3", "HPC_RL_RESTART": "0", **more}


def run(made: Spec, **more: str) -> int:
    """Runs the entry to its end; returns its exit code."""
    entry = [sys.executable, "-m", "hpc_rl.cluster.entry", str(made.path)]
    return subprocess.run(entry, cwd=source_root(), env=environment(**more), timeout=PATIENCE_S, check=False).returncode


def ends(made: Spec) -> list[EndRecord]:
    return end_records(made.ws, StageId(made.round, made.stage))


def log_of(made: Spec, tag: str = "12_3-0") -> Path:
    return made.ws.log_dir(made.round, made.stage) / f"{tag}.out"


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an entry and waits until its body has said "ready"."""
    started = []

    def start_one(made: Spec, **more: str) -> subprocess.Popen[bytes]:
        entry = [sys.executable, "-m", "hpc_rl.cluster.entry", str(made.path)]
        started.append(subprocess.Popen(entry, cwd=source_root(), env=environment(**more)))
        wait_for(lambda: log_of(made).exists() and "ready" in log_of(made).read_text(), "its body", of=started[-1])
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def test_a_spec_is_on_disk_as_it_was_made(tmp_path: Path) -> None:
    made = spec(tmp_path, "pass", environment={"A": "b"}, gpus=0.5)
    assert load_spec(made.path) == made


@pytest.mark.parametrize(
    ("body", "code", "outcome", "error"),
    [
        ("print('fine')", 0, "done", ""),
        ("raise KeyError('speaker_problm')", 1, "error", "KeyError: 'speaker_problm'"),
        ("import sys; sys.exit(3)", 3, "error", ""),
        ("import sys; print('inputs are not there'); sys.exit(75)", 75, "blocked", "inputs are not there"),
        ("import os; os.kill(os.getpid(), 9)", 137, "killed", ""),
        ("import os; os.kill(os.getpid(), 11)", 139, "error", ""),
        ("raise MemoryError('CUDA out of memory')", 1, "out of memory", "MemoryError: CUDA out of memory"),
    ],
)
def test_how_a_body_ended_is_its_exit_code_and_is_written_down(
    tmp_path: Path, body: str, code: int, outcome: str, error: str
) -> None:
    made = spec(tmp_path, body)
    assert run(made) == code
    (end,) = ends(made)
    assert (end.outcome, end.error, end.name, end.job_id) == (outcome, error, made.name, "12_3")
    assert made.ws.resolve(end.log) == log_of(made)


@pytest.mark.parametrize(("kills", "outcome"), [(5, "killed"), (6, "out of memory")])
def test_a_body_that_the_kernels_memory_killer_ended_ran_out_of_memory(
    tmp_path: Path, kills: int, outcome: str
) -> None:
    (tmp_path / "proc").write_text("0::/step\n")
    events = tmp_path / "step/memory.events"
    events.parent.mkdir()
    events.write_text("oom_kill 5\n")
    made = spec(tmp_path, f"import os; open({str(events)!r}, 'w').write('oom_kill {kills}'); os.kill(os.getpid(), 9)")
    program = (  # the entry in a control group of its own, as far as it can tell
        "import functools, pathlib, sys; from hpc_rl.cluster import entry, memory_killer; "
        "spec, *group = map(pathlib.Path, sys.argv[1:]); "
        "memory_killer.kills = functools.partial(memory_killer.kills, *group); sys.exit(entry.run_spec(spec))"
    )
    command = [sys.executable, "-c", program, made.path, tmp_path / "proc", tmp_path]
    done = subprocess.run(command, cwd=source_root(), env=environment(), timeout=PATIENCE_S, check=False)
    (end,) = ends(made)
    assert (done.returncode, end.outcome) == (137, outcome)
    assert ("memory killer" in end.error) == (outcome == "out of memory")


def test_an_end_record_says_what_the_job_cost(tmp_path: Path) -> None:
    body = "import time\nkept = b'x' * 100_000_000\nend = time.process_time() + 0.3\n"
    made = spec(tmp_path, body + "while time.process_time() < end: pass", gpus=2)
    run(made)
    (end,) = ends(made)
    assert end.peak_memory_bytes is not None and 100e6 < end.peak_memory_bytes < 300e6
    assert end.cpu_s > 0.3
    assert end.gpu_s == pytest.approx(2 * (end.ended - end.started))
    assert end.ended - end.started >= 0.3


def test_a_body_that_cannot_be_started_is_an_error_with_the_name_of_what_is_missing(tmp_path: Path) -> None:
    made = spec(tmp_path, ("apptainer-of-another-site", "exec", "x.sif", "python"))
    assert run(made) == 127
    (end,) = ends(made)
    assert end.outcome == "error"
    assert "apptainer-of-another-site" in end.error


def test_a_body_gets_its_ranks_its_stages_variables_and_its_name(tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "HPC_RL_JOB_ID", "HPC_RL_RESTART", "HPC_RL_ATTEMPT", "OMP_NUM_THREADS"]
    made = spec(
        tmp_path,
        f"import os, json; print(json.dumps([os.environ[n] for n in {names}]))",
        environment={"OMP_NUM_THREADS": "3"},
    )
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    assert run(made, **step) == 0
    text = log_of(made, "12_3-0-rank1").read_text()
    assert json.loads(text) == ["1", "4", "12_3", "0", "run-r01-sample-a1-abc", "3"]


def test_each_rank_and_each_restart_has_a_log_and_a_record_of_its_own(tmp_path: Path) -> None:
    made = spec(tmp_path, "print('x')")
    for restart in ("0", "1"):
        for rank in ("0", "1"):
            run(made, HPC_RL_RESTART=restart, RANK=rank, WORLD_SIZE="2")
    assert sorted((end.restart, end.rank) for end in ends(made)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(list(made.ws.log_dir(1, "sample").iterdir())) == 4


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_body_is_told_to_leave_and_may_save(tmp_path: Path, start: Start, number: signal.Signals) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
    made = spec(tmp_path, body.join(["import os, signal, sys, time\n", "print('ready')\ntime.sleep(600)"]))
    process = start(made)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 143
    assert ends(made)[0].outcome == "left"
    assert "saved" in log_of(made).read_text()


def test_a_body_that_does_not_leave_is_killed_after_its_grace(tmp_path: Path, start: Start) -> None:
    ignore = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready')\ntime.sleep(600)"
    made = spec(tmp_path, ignore, grace_s=0.7)
    process = start(made)
    asked = time.monotonic()
    process.terminate()
    assert process.wait(PATIENCE_S) == 137
    assert time.monotonic() - asked > 0.6
    assert ends(made)[0].outcome == "left"


def test_a_body_dies_with_its_entry(tmp_path: Path, start: Start) -> None:
    made = spec(tmp_path, "import os, time\nprint(os.getpid())\nprint('ready')\ntime.sleep(600)")
    process = start(made)
    body = int(log_of(made).read_text().split()[0])
    assert is_alive(body)
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(body), "the end of the body, which outlived its job")
    assert ends(made) == [], "nobody was left to write a record"


KILLED_AT_THE_FORK = """
import os, signal, subprocess, sys, time
from hpc_rl.cluster.entry import die_with_parent
parent, bind = os.getpid(), die_with_parent()

def too_late():
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)
    bind()

subprocess.Popen(["sh", "-c", "echo I live"], preexec_fn=too_late)
"""


def test_a_body_whose_entry_dies_before_it_begins_never_begins() -> None:
    program = [sys.executable, "-c", KILLED_AT_THE_FORK]
    done = subprocess.run(program, capture_output=True, text=True, cwd=source_root(), timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr


# services


FAILS = """
import pathlib, sys
runs = pathlib.Path(sys.argv[1]); runs.open("a").write("x")
sys.exit(0 if len(runs.read_text()) > int(sys.argv[2]) else int(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("failures", "code", "runs", "exit_code"),
    [
        (0, 1, 1, 0),
        (2, 1, 3, 0),
        (99, 1, 1 + RESTARTS_IN_PLACE, 1),
        (99, 75, 1, 75),
    ],
)
def test_a_service_that_dies_is_started_again_in_place_but_not_for_ever(
    tmp_path: Path, failures: int, code: int, runs: int, exit_code: int
) -> None:
    counter = tmp_path / "runs"
    body = (sys.executable, "-c", FAILS, str(counter), str(failures), str(code))
    made = spec(tmp_path, body, service=True, shards=0)
    assert run(made) == exit_code
    assert len(counter.read_text()) == runs
    assert len(ends(made)) == runs


def test_other_jobs_are_not_started_again_in_place(tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    made = spec(tmp_path, (sys.executable, "-c", FAILS, str(counter), "99", "1"))
    assert run(made) == 1
    assert counter.read_text() == "x"


def test_a_service_that_is_told_to_leave_stays_away(tmp_path: Path, start: Start) -> None:
    made = spec(tmp_path, "import time\nprint('ready')\ntime.sleep(600)", service=True, shards=0)
    process = start(made)
    process.terminate()
    process.wait(PATIENCE_S)
    assert [end.outcome for end in ends(made)] == ["left"]


# the scheduler; what stands in for scancel and scontrol only notes that it was called


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of an array element on a machine whose scancel and scontrol write down their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scancel", "scontrol"):
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/asked\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HPC_RL_JOB_ID": "",
        "SLURM_JOB_ID": "15",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
    }


def asked(tmp_path: Path) -> list[str]:
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


def finish(made: Spec) -> None:
    for shard in range(made.shards):
        manifest.write(made.ws, Manifest(1, "sample", shard, ()))


def test_elements_that_still_wait_are_cancelled_when_the_work_has_run_out(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    made = spec(tmp_path, "pass", executor="slurm")
    run(made, **slurm)
    assert asked(tmp_path) == []
    finish(made)
    run(made, **slurm)
    assert asked(tmp_path) == ["scancel --state=PENDING --name=run-r01-sample-a1-abc"]


def test_a_job_that_is_warned_before_its_work_is_done_goes_back_into_the_queue_by_its_own_id(
    tmp_path: Path, slurm: dict[str, str], start: Start
) -> None:
    made = spec(tmp_path, "import time\nprint('ready')\ntime.sleep(600)", executor="slurm")
    process = start(made, **slurm)
    process.send_signal(signal.SIGUSR2)
    process.wait(PATIENCE_S)
    assert asked(tmp_path) == ["scontrol requeue 12_3"]


def test_a_job_that_left_because_its_time_was_too_short_goes_back_into_the_queue(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    made = spec(tmp_path, "import sys; sys.exit(124)", executor="slurm")
    assert run(made, **slurm) == 124
    assert asked(tmp_path) == ["scontrol requeue 12_3"]
    assert [end.outcome for end in ends(made)] == ["left"]


def test_a_job_whose_work_never_fits_is_not_queued_again(tmp_path: Path, slurm: dict[str, str], start: Start) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(76))\n"
    made = spec(
        tmp_path, body.join(["import signal, sys, time\n", "print('ready')\ntime.sleep(600)"]), executor="slurm"
    )
    process = start(made, **slurm)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(PATIENCE_S) == 76
    assert asked(tmp_path) == [] and [end.outcome for end in ends(made)] == ["error"]


def test_a_body_knows_when_it_must_leave(tmp_path: Path) -> None:
    """From its start where Slurm does not say when the job ends, from Slurm where it does; else nothing is known."""
    body = "import time; from hpc_rl.cluster.walltime import *; print(Deadline.of(os.environ).left_s())"
    limited = spec(tmp_path, f"import os; {body}", time_limit_s=600.0, warning_s=180.0)
    run(limited)
    run(limited, SLURM_JOB_END_TIME=str(time.time() + 1180))
    run(spec(tmp_path, f"import os; {body}"))
    first, second, third = map(float, log_of(limited).read_text().split())
    assert 300 < first <= 421 and 800 < second <= 1001 and third == float("inf")


def test_a_companion_stays_until_its_leader_has_ended_whatever_warning_its_job_gets(
    tmp_path: Path, slurm: dict[str, str], start: Start
) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: (print('left', flush=True), sys.exit(143)))\n"
    body = body.join(["import os, signal, sys, time\n", "print('ready')\ntime.sleep(600)"])
    made = spec(tmp_path, body, executor="slurm", service=True, shards=0, companion=True)
    process = start(made, **slurm)
    process.send_signal(signal.SIGUSR2)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert "left" not in log_of(made, "12_3-0").read_text()
    process.terminate()
    assert process.wait(PATIENCE_S) == 143
    assert [end.outcome for end in ends(made)] == ["left"]
    assert asked(tmp_path) == []


@pytest.mark.parametrize("reason", ["it was cancelled", "its work is done"])
def test_a_job_does_not_go_back_into_the_queue_when(
    tmp_path: Path, slurm: dict[str, str], start: Start, reason: str
) -> None:
    made = spec(tmp_path, "import time\nprint('ready')\ntime.sleep(600)", executor="slurm")
    process = start(made, **slurm)
    if reason == "its work is done":
        finish(made)
    process.send_signal(signal.SIGTERM if reason == "it was cancelled" else signal.SIGUSR2)
    process.wait(PATIENCE_S)
    assert not any("requeue" in line for line in asked(tmp_path))


def test_without_slurm_nothing_is_asked_of_it(tmp_path: Path, slurm: dict[str, str]) -> None:
    made = spec(tmp_path, "pass")
    finish(made)
    run(made, **slurm)
    assert asked(tmp_path) == []


def test_a_job_of_other_code_than_its_spec_names_runs_nothing(tmp_path: Path) -> None:
    made = spec(tmp_path, "print('run')", environment={"HPC_RL_CODE": "c0de"})
    (made.ws.code_dir / "c0de").mkdir(parents=True)
    assert run(made) == 126
    (end,) = ends(made)
    assert end.outcome == "error"
    snapshot = made.ws.code_dir / "c0de"
    assert f"OtherCode: this job runs the code in {source_root()}, and was " in end.error
    assert f"submitted with that in {snapshot}" in end.error
    assert "run\n" not in log_of(made).read_text()


def test_a_spec_whose_workspace_cannot_be_looked_at_is_an_error_with_a_record(tmp_path: Path) -> None:
    made = spec(tmp_path, "pass", environment={"HPC_RL_CODE": "gone"})
    copy = made.ws.code_dir / "gone"
    shutil.copytree(source_root() / "hpc_rl", copy / "hpc_rl", ignore=shutil.ignore_patterns("__pycache__"))
    moved = "import os, runpy, sys; import hpc_rl.cluster.entry; os.rename(*sys.argv[2:]); sys.argv[2:] = []; "
    moved += "sys.exit(hpc_rl.cluster.entry.run_spec(__import__('pathlib').Path(sys.argv[1])))"
    command = [sys.executable, "-P", "-c", moved, str(made.path), str(copy), str(tmp_path / "elsewhere")]
    path = environment(PYTHONPATH=str(copy))
    assert subprocess.run(command, env=path, cwd=tmp_path, timeout=PATIENCE_S, check=False).returncode == 126
    (end,) = ends(made)
    assert (end.outcome, end.error.partition(":")[0]) == ("error", "FileNotFoundError")


def test_the_entry_starts_light() -> None:
    code = "import sys, hpc_rl.cluster.entry; print([m for m in sys.modules if m.partition('.')[0] in sys.argv[1:]])"
    heavy = ["pydantic", "yaml", "submitit", "numpy", "torch", "httpx", "rich"]
    listed = subprocess.run(
        [sys.executable, "-c", code, *heavy], cwd=source_root(), capture_output=True, text=True, check=True
    )
    assert listed.stdout == "[]\n"
