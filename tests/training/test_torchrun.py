"""Ranks that torchrun starts find each other as those of srun do, and their exit code is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.training.ranks import elastic
from tests.training.conftest import REPOSITORY
from tests.waiting import PATIENCE_S, wait_for

STANDALONE = ("-m", "hpc_rl.training.ranks.elastic", "--standalone", "--nproc-per-node=2", "--max-restarts=0")


def start(log: Path, *program: str) -> subprocess.Popen[bytes]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "LOCAL_"))}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *STANDALONE, *program], stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            env={**alone, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def test_its_ranks_meet_and_talk(tmp_path: Path) -> None:
    program = ("-m", "tests.training.ranks", "meet", "--workspace", str(tmp_path), "--round", "1")
    assert start(tmp_path / "log", *program).wait(2 * PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("HEARD [0, 1] from 0") == 2


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(124)", 124), ("os.kill(os.getpid(), 9)", 128 + signal.SIGKILL)])
def test_the_code_is_that_of_the_rank_that_failed(tmp_path: Path, ends: str, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {ends}\ntime.sleep(600)\n")
    assert elastic.main([*STANDALONE[2:], str(program)]) == code


def test_told_to_leave_it_tells_its_ranks_and_waits_for_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "def leave(*_):\n    time.sleep(0.5)\n    print('SAVED', flush=True)\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint('THERE', flush=True)\ntime.sleep(600)\n"
    )
    log = tmp_path / "log"
    process = start(log, str(program))
    wait_for(lambda: log.read_text().count("THERE") == 2, log.read_text, of=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert log.read_text().count("SAVED") == 2
