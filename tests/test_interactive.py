"""`launch --interactive` as a person types it, over a pipe and in a terminal (S12)."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_rl.interactive import Standing, block
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.presence import Presence
from hpc_rl.run.shard_leases import leases_of, shard_lease_path
from hpc_rl.run.workspace import Workspace
from tests.waiting import PATIENCE_S, wait_for

NOOP = "benchmarks/noop.yaml"
PROMPT = "Please select operation [c]continue [s]status [q]quit: "
AFTER_A_FAILURE = "Please select operation [c]continue [s]status [q]quit [r]retry: "


class Typist:
    """Types commands for a workspace in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.ws = Workspace(root)
        self.started: list[subprocess.Popen[str]] = []

    def command(self, *words: str, executor: str = "debug", config: str = NOOP, rounds: int = 3) -> list[str]:
        where = ["--workspace", str(self.ws.root), "--executor", executor, "--set", f"run.rounds={rounds}"]
        return [sys.executable, "-m", "hpc_rl.launch", config, *where, *words]

    def types(self, letters: str, **where: str | int) -> subprocess.CompletedProcess[str]:
        """Launches with these lines in the pipe."""
        return subprocess.run(
            self.command("--interactive", **where),  # type: ignore[arg-type]
            cwd=source_root(), input=letters, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip

    def starts(self, *words: str, stdin: int = subprocess.PIPE, **where: str) -> subprocess.Popen[str]:
        """A launch in the background, with its output in one stream."""
        self.started.append(
            subprocess.Popen(
                self.command(*words, **where),
                cwd=source_root(),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return self.started[-1]

    def say(self, launched: subprocess.Popen[str], letters: str) -> None:
        """Types lines for a launch in the background."""
        assert launched.stdin is not None
        launched.stdin.write(letters)
        launched.stdin.flush()

    def running(self) -> set[str]:
        """Stages of which the launch has something running."""
        path = self.ws.lease_folder / "local_queue.json"
        queue = json.loads(path.read_text()) if path.exists() else []
        return {job["name"].split("-")[2] for job in queue if job["state"] == "RUNNING"}

    def rounds_done(self) -> list[int]:
        return [round for round in (1, 2, 3) if manifest.done_shards(self.ws, round, "evaluate")]

    def rounds_submitted(self) -> set[int]:
        return {attempt.round for attempt in Ledger(self.ws).history().attempts}


@pytest.fixture
def typist(tmp_path: Path) -> Iterator[Typist]:
    made = Typist(tmp_path / "run")
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_what_is_said_before_a_round() -> None:
    """S12, in the seed's words."""
    said = block(Standing(2, 5))
    for line in ("Current Round: 2", "Completed Rounds: 1", "Total Rounds: 5", "Can Continue: Yes"):
        assert f"   - {line}\n" in said
    assert said.endswith("Preparing to execute Round 2")
    lost = block(Standing(2, 5, given_up=("train: it failed",)))
    assert "   - Given Up in Round 1: train: it failed\n" in lost
    assert "Can Continue: Yes, by a retry: it failed\n" in block(Standing(2, 5, failure="it failed"))


def test_each_c_plays_one_round_and_nothing_of_the_next_is_submitted_before_its_own(typist: Typist) -> None:
    """S12."""
    first = typist.types("what\n\nR\n Status \nc\n")  # and the pipe ends: q
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count(PROMPT) == 6
    assert "'what' is none of c, s, q\n" in first.stdout
    assert "nothing has failed: c runs the round" in first.stdout
    assert re.search(r"^ +1  sample +not yet", first.stdout, re.MULTILINE), "the table of hpc_rl.status"
    assert "Completed Rounds: 1" in first.stdout and "nothing is lost; go on with the same command" in first.stdout
    assert (typist.rounds_done(), typist.rounds_submitted()) == ([1], {1})
    assert not Ledger(typist.ws).history().paused
    second = typist.types("c\nq\nc\n")
    assert second.returncode == 0 and "Current Round: 3" in second.stdout
    assert (typist.rounds_done(), typist.rounds_submitted()) == ([1, 2], {1, 2})
    plain = subprocess.run(
        typist.command(), cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert plain.returncode == 0, "without a prompt it goes on by itself: " + plain.stdout + plain.stderr
    assert typist.rounds_done() == [1, 2, 3]
    longer = typist.types("c\nand nobody asks again", rounds=4)
    assert longer.returncode == 0 and f"the run in {typist.ws.root} is finished" in longer.stdout
    assert json.loads((typist.ws.root / "report.json").read_text())
    assert all(attempt.number == 1 for attempt in Ledger(typist.ws).history().attempts)
    again = typist.types("c\n", rounds=4)
    assert again.returncode == 0 and "is finished" in again.stdout and PROMPT not in again.stdout


def test_a_closed_input_is_a_person_who_has_left(typist: Typist) -> None:
    command = " ".join(typist.command("--interactive"))
    left = subprocess.run(
        ["bash", "-c", f"{command} <&-"], cwd=source_root(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (left.returncode, typist.rounds_submitted()) == (0, set()), left.stdout + left.stderr


# in a terminal


class Terminal:
    """A launch with a terminal of its own, and what it has shown."""

    def __init__(self, typist: Typist) -> None:
        self.main, theirs = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            typist.command("--interactive"), cwd=source_root(), stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, env={**os.environ, "TERM": "xterm"},
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self.main, False)

    def shows(self, what: str, times: int) -> bool:
        try:
            self.shown += os.read(self.main, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            pass
        except OSError:  # EIO: nobody has the other side open any more
            return self.shown.count(what) >= times
        return self.shown.count(what) >= times

    def wait_for(self, what: str, times: int = 1) -> None:
        wait_for(lambda: self.shows(what, times), lambda: f"{what!r} in {self.shown!r}", of=self.process)

    def keys(self, keys: str) -> None:
        os.write(self.main, keys.encode())


def take_terminal() -> None:
    """Make standard input the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("leave", ["Ctrl-C", "SIGTERM"])
def test_in_a_terminal_the_line_can_be_edited_and_whoever_leaves_at_the_prompt_quits(
    typist: Typist, leave: str
) -> None:
    """S12, S11."""
    terminal = Terminal(typist)
    try:
        terminal.wait_for(PROMPT.strip())
        terminal.keys("q\x7fc\r")  # q, backspace, c
        terminal.wait_for(PROMPT.strip(), 2)
        if leave == "SIGTERM":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.keys("\x03")
        terminal.wait_for("nothing is lost; go on with the same command")
        assert terminal.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in terminal.shown
        assert typist.rounds_done() == [1]
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)


# while a round runs


def hold_up(typist: Typist, stage: str = "grade") -> Callable[[], None]:
    """Keeps a stage of round 1 from being done until what is returned is called."""
    presence = Presence(leases_of(typist.ws.stage_dir(1, stage)), 60.0)
    assert presence.link(shard_lease_path(presence.folder, 0, 1))
    return presence.close


def test_ctrl_c_in_a_round_leaves_a_run_that_goes_on(typist: Typist) -> None:
    """S12, S11: graceful Ctrl-C and SIGTERM."""
    go_on = hold_up(typist)
    for number in (signal.SIGINT, signal.SIGTERM):
        (typist.ws.lease_folder / "local_queue.json").unlink(missing_ok=True)  # of the launch before
        launched = typist.starts("--interactive", executor="local")
        typist.say(launched, "c\n")
        wait_for(lambda: "grade" in typist.running(), "grade", of=launched)
        launched.send_signal(number)
        output, _ = launched.communicate(timeout=PATIENCE_S)
        assert launched.returncode == 130, output
        assert "nothing is lost; go on with the same command" in output and "Traceback" not in output
        assert typist.rounds_submitted() == {1}
        assert Ledger(typist.ws).history().paused
    go_on()
    again = typist.types("c\n", executor="local")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (typist.rounds_done(), typist.rounds_submitted()) == ([1], {1})


# a round that fails

FAILING = """\
recipe: moody.recipe
run: {name: moody, gate_patience_s: 1}
"""

RECIPE = """
from hpc_rl.orchestrate.graph import Kind, Stage, StageId

def stages(config, round):
    if round:
        needs = (StageId(round - 1, "work"),) if round > 1 else ()
        yield Stage(StageId(round, "work"), "moody.body", Kind.SINGLE, needs=needs)
"""

BODY = """
from hpc_rl.orchestrate.job import open_job

for shard in open_job("work").shards():
    MOOD
"""


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A recipe `moody.yaml` of one stage; called with a statement, it is what its jobs do from now on."""
    package = tmp_path / "moody"
    package.mkdir()
    for name, text in (("__init__", ""), ("recipe", RECIPE)):
        (package / f"{name}.py").write_text(text)
    (tmp_path / "moody.yaml").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{source_root()}{os.pathsep}{tmp_path}")

    def be(mood: str) -> None:
        (package / "body.py").write_text(BODY.replace("MOOD", mood))

    be("raise KeyError('speaker_problm')")
    return be


def test_a_round_that_failed_shows_why_and_r_tries_it_again_with_the_code_as_it_is_then(
    typist: Typist, moody: Callable[[str], None], tmp_path: Path
) -> None:
    """S12: retry."""
    launched = typist.starts("--interactive", executor="local", config=str(tmp_path / "moody.yaml"))
    assert launched.stdout is not None

    def shown_until(prompt: str) -> str:
        shown = ""
        while not shown.endswith(prompt):
            shown += (last := os.read(launched.stdout.fileno(), 1 << 16).decode())  # type: ignore[union-attr]
            assert last, shown
        return shown

    typist.say(launched, "c\n")
    failed = "Can Continue: Yes, by a retry: round 1 work failed 2 times with the same error: KeyError"
    assert failed in shown_until(AFTER_A_FAILURE)
    typist.say(launched, "s\n")
    assert re.search(r"^ +1  work +failed", shown_until(AFTER_A_FAILURE), re.MULTILINE)
    moody("shard.commit([], made_from={})")
    typist.say(launched, "retry\n")
    assert "Current Round: 2" in shown_until(PROMPT)
    assert [a.number for a in Ledger(typist.ws).history().of(1, "work")] == [1, 2, 3]
    moody("raise ValueError('again')")
    output, _ = launched.communicate("c\nq\n", timeout=PATIENCE_S)
    assert launched.returncode == 1, "who quits where the run has stopped is told by the exit code"
    assert "the run stopped: round 2 work failed 2 times with the same error: ValueError" in output
