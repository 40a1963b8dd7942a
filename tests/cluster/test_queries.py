"""What Slurm is asked, and with which environment; real processes stand in where there is no Slurm."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.cluster import queries
from hpc_rl.cluster.base import ExecutorError, Queued

Command = Callable[[str, str], None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Puts a shell script on the PATH under the name of one of Slurm's commands."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def test_a_job_submitted_from_inside_a_job_inherits_none_of_its_options() -> None:
    inside = {
        "SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "8", "SBATCH_PARTITION": "x", "SRUN_DEBUG": "3",
        "SALLOC_ACCOUNT": "y", "SQUEUE_FORMAT": "%i", "SCANCEL_INTERACTIVE": "1", "SUBMITIT_EXECUTOR": "slurm",
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "HPC_RL_JOB_ID": "1_2",
        "HPC_RL_RESTART": "1", "HPC_RL_ATTEMPT": "a", "HPC_RL_NODELIST_HEAD": "node1",
        "HPC_RL_LEAVE_AT": "9", "HPC_RL_STARTED": "1.5",
    }  # fmt: skip
    outside = {
        "SLURM_CONF": "/etc/x.conf", "PATH": "/bin", "HOME": "/root", "HPC_RL_CODE": "c0de", "RANKING": "1",
        "MY_SLURM_NOTE": "2", "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip
    assert queries.clean_environment({**inside, **outside}) == outside


@pytest.mark.parametrize(
    ("indices", "count"),
    [
        ("7", 1), ("0-3", 4), ("0-9%2", 10), ("1,3,7", 3), ("1-39:2", 20), ("1,3,5-9:2%4", 5),
        ("0-897:3", 300), ("1,3,...", 2), ("", 1),
    ],
)  # fmt: skip
def test_elements_of_an_array_are_counted(indices: str, count: int) -> None:
    assert queries.count_elements(indices) == count


def test_one_squeue_answers_for_all_submissions(command: Command, tmp_path: Path) -> None:
    lines = [
        "17|RUNNING|None|node1|run-r01-train-a1-x",
        "18_[0-3%2]|PENDING|Dependency||run-r01-sample-a1-y",
        "18_4|RUNNING|None|node[2-3]|run-r01-sample-a1-y",
        "19|PENDING|Priority||somebody-elses",
        "21+0|RUNNING|None|node1|run-r01-grade-a1-z",
        "21+1|RUNNING|None|node4|run-r01-grade.listener-a1-z",
    ]
    listing = "\n".join(lines)
    command("squeue", f'echo "$SLURM_BITSTR_LEN $*" >> {tmp_path}/asked\ncat <<END\n{listing}\nEND')
    names = [line.rpartition("|")[2] for line in lines if "somebody" not in line]
    assert queries.queued_jobs(names, owner=1234) == [
        Queued("run-r01-train-a1-x", "17", "RUNNING", "None", "node1"),
        Queued("run-r01-sample-a1-y", "18_0-3%2", "PENDING", "Dependency", "", 4),
        Queued("run-r01-sample-a1-y", "18_4", "RUNNING", "None", "node[2-3]"),
        Queued("run-r01-grade-a1-z", "21", "RUNNING", "None", "node1"),
        Queued("run-r01-grade.listener-a1-z", "21", "RUNNING", "None", "node4"),
    ]
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith("0 "), "array expressions are asked for in full length"
    assert "--user=1234" in asked


def test_nothing_is_asked_about_nothing(command: Command) -> None:
    command("squeue", "exit 1")
    assert queries.queued_jobs([]) == []


def test_a_busy_controller_is_asked_again(command: Command, tmp_path: Path) -> None:
    busy = "slurm_load_jobs error: Socket timed out on send/recv operation"
    command(
        "squeue",
        f'echo x >> {tmp_path}/calls\n[ "$(wc -l < {tmp_path}/calls)" -ge 3 ] || {{ echo "{busy}" >&2; exit 1; }}',
    )
    assert queries.ask(["squeue"]) == ""
    assert (tmp_path / "calls").read_text() == "x\nx\nx\n"


def test_patience_with_the_controller_has_an_end(command: Command) -> None:
    command("squeue", 'echo "Unable to contact slurm controller (connect failure)" >&2; exit 1')
    with pytest.raises(ExecutorError, match="Unable to contact slurm controller"):
        queries.ask(["squeue"], patience_s=0.8)


def test_a_plain_error_is_not_asked_again(command: Command, tmp_path: Path) -> None:
    command("squeue", f'echo x >> {tmp_path}/calls; echo "squeue: error: Invalid user: nobody" >&2; exit 1')
    with pytest.raises(ExecutorError, match="`squeue --me` failed: squeue: error: Invalid user"):
        queries.ask(["squeue", "--me"])
    assert (tmp_path / "calls").read_text() == "x\n"


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExecutorError, match="squeue is not on the PATH: this is no machine of a Slurm cluster"):
        queries.queued_jobs(["x"])


def test_the_largest_array_is_asked_of_the_cluster(command: Command) -> None:
    command("scontrol", 'echo "MaxArraySize            = 4001"; echo "MaxJobCount = 10000"')
    assert queries.max_array_size() == 4001
