"""`python -m hpc_rl.launch` as a user types it, on the no-op run with the local and the debug executor."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.base import JobRequest, Resources
from hpc_rl.cluster.entry import Spec
from hpc_rl.cluster.local import LocalExecutor
from hpc_rl.launch import drive
from hpc_rl.orchestrate.decide import Decision, Policy
from hpc_rl.orchestrate.graph import Kind
from hpc_rl.orchestrate.reconcile import Run
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.closed import NotClosed
from hpc_rl.run.code import source_root
from hpc_rl.run.lease import acquire
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.presence import Presence
from hpc_rl.run.shard_leases import leases_of, shard_lease_path
from hpc_rl.run.workspace import Workspace
from tests.waiting import PATIENCE_S, wait_for

NOOP = "benchmarks/noop.yaml"
STAGES = {"sample": 4, "grade": 1, "score": 1, "train": 1, "evaluate": 1}


class Shell:
    """Types commands in the repository's folder, for a workspace in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.ws = Workspace(root)
        self.started: list[subprocess.Popen[str]] = []

    def command(self, *words: str, executor: str = "local", rounds: int = 1) -> list[str]:
        where = ["--workspace", str(self.ws.root), "--executor", executor, "--set", f"run.rounds={rounds}"]
        where += ["--set", "stages.sample.tasks=2", "--set", "stages.train.nodes=1"]
        return [sys.executable, "-m", "hpc_rl.launch", NOOP, *where, *words]

    def launch(self, *words: str, executor: str = "local", rounds: int = 1) -> subprocess.CompletedProcess[str]:
        return self.run(self.command(*words, executor=executor, rounds=rounds))

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def start(self, *words: str, rounds: int = 1) -> subprocess.Popen[str]:
        """A launch that goes on in the background, with its output in one stream."""
        self.started.append(
            subprocess.Popen(
                self.command(*words, rounds=rounds),
                cwd=source_root(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # as in a terminal; where the tests themselves run in the background, Ctrl-C is ignored
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return self.started[-1]

    def done(self) -> dict[str, int]:
        return {stage: len(manifest.done_shards(self.ws, 1, stage)) for stage in STAGES}

    def contents(self) -> dict[str, tuple[bytes, int]]:
        """Every file of the workspace with its content and time, but not the marks of a run that goes on."""
        passing = ("leases/", "/.tmp-")
        found = [p for p in self.ws.root.rglob("*") if p.is_file() and not any(mark in str(p) for mark in passing)]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path / "run")
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def hold_up(shell: Shell, stage: str = "grade") -> Callable[[], None]:
    """Keeps a stage from being done, by holding the lease of its shard; what is returned lets it go."""
    presence = Presence(leases_of(shell.ws.stage_dir(1, stage)), 60.0)
    assert presence.link(shard_lease_path(presence.folder, 0, 1))
    return presence.close


def running(shell: Shell) -> list[str]:
    """Stages of which the local launcher has something running."""
    path = shell.ws.lease_folder / "local_queue.json"
    queue = json.loads(path.read_text()) if path.exists() else []
    return sorted({job["name"].split("-")[2] for job in queue if job["state"] == "RUNNING"})


# from start to end


def test_a_run_finishes_and_says_what_to_type_next(shell: Shell) -> None:
    launched = shell.launch(rounds=2)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert shell.done() == STAGES
    assert f"the run in {shell.ws.root} is finished" in launched.stdout
    for command in ("hpc_rl.status", "hpc_rl.report", "hpc_rl.cancel"):
        assert f"python -m {command} {shell.ws.root}" in launched.stdout
    assert "round 1 sample done" in launched.stdout
    attempts = Ledger(shell.ws).history().attempts
    assert sorted(a.stage for a in attempts) == sorted([*STAGES] * 2), "each stage once, and no advance jobs here"
    assert all(m.made_from["code"] == code_of(shell) for m in manifests(shell))


def code_of(shell: Shell) -> str:
    (snapshot,) = shell.ws.code_dir.iterdir()
    return snapshot.name


def manifests(shell: Shell) -> list[manifest.StoredManifest]:
    return [manifest.read(shell.ws, 1, stage, shard) for stage, shards in STAGES.items() for shard in range(shards)]


def test_launching_a_finished_run_says_so_and_changes_nothing(shell: Shell) -> None:
    def kept() -> dict[str, bytes]:  # but for the views, which are written anew
        found = shell.contents().items()
        return {path: content for path, (content, _) in found if not re.search(r"/(training_state|report)\.", path)}

    shell.launch(executor="debug")
    before = kept()
    again = shell.launch(executor="debug")
    assert (again.returncode, "is finished" in again.stdout) == (0, True)
    assert kept() == before


def test_the_debug_executor_runs_everything_in_its_own_process(shell: Shell) -> None:
    launched = shell.launch(executor="debug", rounds=3)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert shell.done() == STAGES
    pids = {m.job_id.partition(".")[0] for m in manifests(shell)}
    assert len(pids) == 1


def test_a_run_may_be_started_in_one_executor_and_resumed_in_another(shell: Shell) -> None:
    assert shell.launch(executor="debug", rounds=1).returncode == 0
    before = manifests(shell)
    resumed = shell.launch(executor="local", rounds=2)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "the stored config was updated" in resumed.stdout
    assert manifests(shell) == before, "what was done is not done again"
    assert manifest.done_shards(shell.ws, 2, "evaluate") == {0}


# while it runs


def test_a_second_launch_while_the_first_runs_says_who_runs_and_changes_nothing(shell: Shell) -> None:
    go_on = hold_up(shell)
    first = shell.start()
    wait_for(
        lambda: running(shell) == ["grade"] and list(shell.ws.log_dir(1, "grade").glob("*.out")), "grade", of=first
    )
    before = shell.contents()
    second = shell.launch(rounds=5)
    assert second.returncode == 0
    assert f"already running: process {first.pid} on" in second.stdout
    assert "Nothing was changed" in second.stdout
    assert shell.contents() == before
    go_on()
    assert first.wait(PATIENCE_S) == 0
    assert shell.done() == STAGES


def test_two_launches_at_one_moment_make_one_run(shell: Shell) -> None:
    launches = [shell.start() for _ in range(2)]
    outputs = [launch.communicate(timeout=PATIENCE_S)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    assert sum("is finished" in output for output in outputs) >= 1
    assert all("is finished" in output or "already running" in output for output in outputs), outputs
    assert shell.done() == STAGES
    assert len(Ledger(shell.ws).history().attempts) == len(STAGES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_pauses_and_the_same_command_goes_on(shell: Shell, number: signal.Signals) -> None:
    go_on = hold_up(shell)
    first = shell.start()
    wait_for(lambda: shell.done()["sample"] == 4, "the samples", of=first)
    first.send_signal(number)
    output, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130
    assert "nothing is lost; go on with the same command" in output
    assert "Traceback" not in output
    assert Ledger(shell.ws).history().paused == "the launcher was interrupted"
    assert not processes_of(shell)
    before = [manifest.read(shell.ws, 1, "sample", shard) for shard in range(4)]
    go_on()
    again = shell.launch()
    assert again.returncode == 0, again.stdout + again.stderr
    assert shell.done() == STAGES
    assert [manifest.read(shell.ws, 1, "sample", shard) for shard in range(4)] == before


def test_a_launcher_that_is_killed_takes_its_jobs_along_and_the_same_command_goes_on(shell: Shell) -> None:
    go_on = hold_up(shell)
    first = shell.start()
    wait_for(lambda: list(shell.ws.log_dir(1, "grade").glob("*.out")), "grade's log", of=first)
    first.kill()
    first.wait()
    wait_for(lambda: not processes_of(shell), lambda: f"the end of {processes_of(shell)}")
    go_on()
    again = shell.launch()
    assert again.returncode == 0, again.stdout + again.stderr
    assert shell.done() == STAGES


def processes_of(shell: Shell) -> list[str]:
    """Command lines of live processes that name the workspace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(shell.ws.root) in command:
            found.append(command)
    return found


GOES_ON = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_launcher_that_cannot_go_on_lets_its_jobs_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(source_root() / NOOP, [], {}, tmp_path / "run", cwd=tmp_path)
    run = open_run(config, source_root() / NOOP)
    body = (sys.executable, "-u", "-c", GOES_ON)
    spec = Spec("run-r01-sample-a1-abc", str(run.ws.root), 1, "sample", 1, "local", body, {})
    spec.save()
    logs = run.ws.log_dir(1, "sample")

    def follow(_run: Run, executor: LocalExecutor, code: Path, *_more: object, **_options: float) -> Decision:
        executor.submit(JobRequest(spec, Kind.SINGLE, Resources(), code), lambda job_id: None)
        executor.poll()
        wait_for(lambda: [log for log in logs.glob("*.out") if "ready" in log.read_text()], "the job")
        raise NotClosed("others may write to it by now")

    monkeypatch.setattr("hpc_rl.orchestrate.follow.follow", follow)
    lease = acquire(run.ws.lease_folder, "driver", 3600.0)
    assert lease is not None
    with lease, pytest.raises(NotClosed, match="by now"):
        drive(run, "local", Policy(1, 2), lease)
    (log,) = logs.glob("*.out")
    assert log.read_text() == "ready\nsaved\n"
    assert not Ledger(run.ws).history().paused


def test_cancel_stops_a_launcher_that_runs_and_launch_goes_on(shell: Shell) -> None:
    go_on = hold_up(shell)
    first = shell.start()
    wait_for(lambda: shell.done()["sample"] == 4, "the samples", of=first)
    cancelled = shell.run([sys.executable, "-m", "hpc_rl.cancel", str(shell.ws.root)])
    assert cancelled.returncode == 0, cancelled.stderr
    assert "paused" in cancelled.stdout
    output, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 1
    assert "the run paused: cancelled by the user" in output
    assert not processes_of(shell)
    go_on()
    assert shell.launch().returncode == 0
    assert shell.done() == STAGES


# a body that fails


FAILING = """\
recipe: failing.recipe
run: {name: failing, rounds: 1, gate_patience_s: 1}
"""

RECIPE = """
from hpc_rl.orchestrate.graph import Kind, Stage, StageId

def stages(config, round):
    if round:
        yield Stage(StageId(round, "break"), "failing.body", Kind.SINGLE, optional=True)
        yield Stage(StageId(round, "after"), "failing.body", Kind.SINGLE, needs=(StageId(round, "break"),))
"""

BODY = """
import sys
from hpc_rl.orchestrate.job import open_job

for shard in open_job("break").shards():
    if shard.job.stage.name == "after":
        shard.commit([], made_from={})
        continue
    raise KeyError("speaker_problm")
"""


@pytest.fixture
def failing(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a module, as a rule the launcher, where there is a recipe with a stage that fails."""
    (tmp_path / "failing").mkdir()
    for name, text in (("__init__", ""), ("recipe", RECIPE), ("body", BODY)):
        (tmp_path / "failing" / f"{name}.py").write_text(text)
    (tmp_path / "failing.yaml").write_text(FAILING)
    environment = {**os.environ, "PYTHONPATH": f"{source_root()}{os.pathsep}{tmp_path}"}

    def run(*words: str, module: str = "launch") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"hpc_rl.{module}", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    return run


LAUNCH = ("failing.yaml", "--executor", "local")


def test_a_stage_that_the_recipe_can_do_without_is_given_up_and_the_run_goes_on(
    tmp_path: Path, failing: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """S11: `auto_retry_enabled` and `auto_continue_on_failure`."""
    launched = failing(*LAUNCH, "--set", "run.auto_retry=false", "--set", "run.continue_on_failure=true")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    why = "given up: round 1 break failed, and run.auto_retry is off; the last one: error, KeyError: 'speaker_problm'"
    assert f"round 1 break is {why}" in launched.stdout
    ws = Workspace(tmp_path / "runs" / "failing")
    assert [a.stage for a in Ledger(ws).history().attempts if not a.cancelled] == ["break", "after"]
    shown = failing(str(ws.root), module="status").stdout
    assert re.search(r"^ +1  break +given up +1/1", shown, re.MULTILINE) and f"round 1 break: {why}" in shown
    assert "given up" in (ws.root / "report.txt").read_text()


def test_the_same_program_error_twice_stops_the_run_and_names_the_error_and_its_log(
    tmp_path: Path, failing: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    package = tmp_path / "failing"
    launched = failing(*LAUNCH)
    assert launched.returncode == 1, launched.stdout + launched.stderr
    assert "round 1 break failed 2 times with the same error: KeyError: 'speaker_problm'" in launched.stderr
    log = re.search(r"\(log: (.*?)\)", launched.stderr)
    assert log is not None
    assert "Traceback" in (tmp_path / "runs" / "failing" / log[1]).read_text()
    ws = Workspace(tmp_path / "runs" / "failing")
    assert [a.number for a in Ledger(ws).history().of(1, "break")] == [1, 2]
    (package / "body.py").write_text(BODY.replace('raise KeyError("speaker_problm")', "shard.commit([], made_from={})"))
    again = failing(*LAUNCH)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list(ws.code_dir.iterdir())) == 2, "the mended code is a snapshot of its own"


# the code that jobs import


MINE = """\
recipe: mine.recipe
run: {name: mine, rounds: 2}
"""

LOOKS_AROUND = """
import os
import sys
from pathlib import Path

import hpc_rl, jobs, mine
from hpc_rl.orchestrate.job import open_job

for shard in open_job("look").shards():
    entry = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\\0")
    paths = [module.__file__ for module in (hpc_rl, jobs, mine, sys.modules["__main__"])]
    output = shard.output("paths.txt")
    output.write_text("\\n".join([*paths, entry[1]]))
    shard.commit([output], made_from={})
    for name in ("hpc_rl", "jobs", "mine"):  # an edit while later jobs wait
        (Path(CHECKOUT) / name / "__init__.py").write_text("raise RuntimeError('edited')")
"""

TWO_ROUNDS = """
from hpc_rl.orchestrate.graph import Kind, Stage, StageId

def stages(config, round):
    if round:
        needs = (StageId(round - 1, "look"),) if round > 1 else ()
        yield Stage(StageId(round, "look"), "mine.body", Kind.SINGLE, needs=needs)
"""


def test_jobs_of_all_rounds_import_the_snapshot_although_the_checkout_of_the_launch_changes(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("hpc_rl", "jobs"):
        shutil.copytree(source_root() / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "mine").mkdir()
    body = LOOKS_AROUND.replace("CHECKOUT", repr(str(checkout)))
    for name, text in (("__init__", ""), ("recipe", TWO_ROUNDS), ("body", body)):
        (checkout / "mine" / f"{name}.py").write_text(text)
    (checkout / "mine.yaml").write_text(MINE)
    command = [sys.executable, "-m", "hpc_rl.launch", "mine.yaml", "--executor", "local"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    launched = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert launched.returncode == 0, launched.stdout + launched.stderr
    ws = Workspace(checkout / "runs" / "mine")
    (code,) = ws.code_dir.iterdir()
    imported = [code / name for name in ("hpc_rl/__init__.py", "jobs/__init__.py", "mine/__init__.py", "mine/body.py")]
    for round in (1, 2):
        assert manifest.read(ws, round, "look", 0).made_from["code"] == code.name
        (output,) = ws.stage_dir(round, "look").glob("*paths.txt")
        assert output.read_text().split("\n") == [*map(str, imported), "-P"]


# bad input


def test_a_workspace_of_another_config_is_refused_with_the_keys_and_the_ways_out(shell: Shell) -> None:
    shell.launch("--init")
    before = shell.contents()
    refused = shell.launch("--set", "run.seed=7")
    assert refused.returncode == 2
    assert "holds a run with another config" in refused.stderr
    assert re.search(r"run\.seed: 0 there, 7 in", refused.stderr)
    for way_out in ("--workspace", "undo the changes", f"mv {shell.ws.root}"):
        assert way_out in refused.stderr
    assert shell.contents() == before


def test_where_and_how_patiently_a_run_runs_may_change(shell: Shell) -> None:
    shell.launch("--init")
    changed = shell.launch("--set", "stages.train.time_min=60", "--set", "run.max_attempts=9", executor="debug")
    assert changed.returncode == 0, changed.stdout + changed.stderr
    assert json.loads(shell.ws.config_path.read_text())["run"]["max_attempts"] == 9


def test_a_corrupt_state_file_is_rebuilt_and_said(shell: Shell) -> None:
    shell.launch(executor="debug")
    before = json.loads(shell.ws.state_path.read_text())
    shell.ws.state_path.write_text('{"epoch": 3, "rou')
    launched = shell.launch(executor="debug")
    assert launched.returncode == 0
    assert "training_state.json could not be read" in launched.stdout
    assert "rebuilt" in launched.stdout
    after = json.loads(shell.ws.state_path.read_text())
    assert after["rounds"] == before["rounds"]
    assert after["status"] == "finished"


def test_a_corrupt_config_in_the_workspace_is_named(shell: Shell) -> None:
    shell.launch("--init")
    shell.ws.config_path.write_text("{")
    launched = shell.launch()
    assert launched.returncode == 2
    assert "training_config.json is not valid JSON" in launched.stderr
    assert "Traceback" not in launched.stderr


def test_a_workspace_that_cannot_be_written_to_is_named_before_anything_happens(shell: Shell) -> None:
    parent = shell.ws.root.parent
    parent.chmod(0o555)
    # permissions do not hinder root, unless it gives that capability away (capabilities(7))
    prefix = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    launched = shell.run([*prefix, *shell.command()])
    assert launched.returncode == 2, launched.stdout
    assert f"cannot write to {parent}: Permission denied" in launched.stderr
    assert "choose another folder with --workspace" in launched.stderr
    assert not list(parent.iterdir())


def test_executor_slurm_without_sbatch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    command = Shell(tmp_path / "run").command(executor="slurm")
    launched = subprocess.run(
        command,
        cwd=source_root(),
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert launched.returncode == 2
    assert "there is no sbatch on the PATH" in launched.stderr
    assert "--executor local" in launched.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("executor", ["slurm", "local", "debug"])
def test_a_dry_run_shows_the_plan_and_writes_nothing(shell: Shell, executor: str) -> None:
    shown = shell.launch("--dry-run", "-v", executor=executor, rounds=3)
    assert shown.returncode == 0, shown.stderr
    for word in (
        "round 1 (and 2 more like it)",
        "sample",
        "2 tasks",
        "after sample",
        "nothing was submitted or written",
    ):
        assert word in shown.stdout
    assert ("#SBATCH --array=0-1%2" in shown.stdout) == (executor == "slurm")
    assert not shell.ws.root.exists()


def test_a_dry_run_whose_reader_has_left_is_no_error(shell: Shell) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        shown = subprocess.run(
            shell.command("--dry-run"), cwd=source_root(), stdout=nobody, stderr=subprocess.PIPE, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert shown.returncode == -signal.SIGPIPE
    assert shown.stderr == ""


def test_init_makes_the_workspace_and_starts_nothing(shell: Shell) -> None:
    made = shell.launch("--init", executor="slurm")
    assert made.returncode == 0, made.stderr
    assert shell.ws.config_path.is_file()
    assert (shell.ws.root / "noop.yaml").read_text() == (source_root() / NOOP).read_text()
    assert not shell.ws.ledger_path.exists()
