"""Ranks that find each other, whatever lies around, and that leave when told to."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from hpc_rl.run.workspace import Workspace
from hpc_rl.training.ranks import distributed
from hpc_rl.training.ranks.distributed import World
from tests.training.conftest import start_ranks
from tests.waiting import PATIENCE_S, wait_for

PROGRAM = ("tests.training.ranks",)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_nobody(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert distributed.get_world_info() == World(0, 1, 0, 1)
    with distributed.process_group(tmp_path) as world:
        assert world.is_main and distributed.all_gather_objects("x") == ["x"]
        assert distributed.broadcast_object({"a": 1}) == {"a": 1}
        distributed.barrier()
    assert not list(tmp_path.iterdir())


def test_a_job_of_one_is_not_taken_for_a_distributed_one(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        alone.setenv(name, value)
    with distributed.process_group(tmp_path):
        from accelerate import PartialState

        PartialState._reset_state()
        assert not PartialState(cpu=True).use_distributed


def test_slurms_words_for_ranks_are_understood(alone: pytest.MonkeyPatch) -> None:
    slurm = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_JOB_ID": "80", "SLURM_RESTART_COUNT": "2",
    }  # fmt: skip
    for name, value in slurm.items():
        alone.setenv(name, value)
    alone.delenv("HPC_RL_JOB_ID", raising=False)
    assert distributed.get_world_info() == World(3, 4, 1, 2)
    assert distributed.rendezvous_name({**slurm}) == "rendezvous-77_5-2.json"


def test_backends_follow_the_hardware() -> None:
    import torch

    assert distributed.choose_backend("auto") == ("nccl" if torch.cuda.is_available() else "gloo")
    assert distributed.choose_backend("gloo") == "gloo"


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What two ranks say that met although a file of a dead job lay there, by rank."""
    folder = tmp_path_factory.mktemp("met")
    with socket.socket() as listening:  # somebody else's server now has the dead job's port
        listening.bind(("127.0.0.1", 0))
        stale = {"host": "127.0.0.1", "port": listening.getsockname()[1], "nonce": "dead", "world_size": 2}
        (folder / "rendezvous-5-0.json").write_text(json.dumps(stale))
        ranks = start_ranks(Workspace(folder), 2, "5", (*PROGRAM, "meet"))
        assert ranks.wait() == [0, 0], ranks.said()
    assert not list(folder.glob("rendezvous-*"))
    return [log.read_text() for log in ranks.logs]


def test_ranks_meet_although_a_file_of_a_dead_job_lies_there(met: list[str]) -> None:
    assert all("HEARD [0, 1] from 0" in said for said in met)
    assert all("OTHERS MAY 0o0\n" in said for said in met)


def test_rows_of_ranks_with_different_numbers_of_them_are_gathered_without_fillers(met: list[str]) -> None:
    assert all("GATHERED [1.0, 2.0] [5.0, 6.0]" in said and "AS BEFORE [0, 1]" in said for said in met)


def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take_and_hear_when_it_fails(met: list[str]) -> None:
    assert all("WAITED True" in said for said in met)
    assert "SAID disk full" in met[0] and "SAID rank 0 failed while it fails; see its log" in met[1]


def test_a_rank_that_hangs_in_a_collective_leaves_on_sigterm(tmp_path: Path) -> None:
    ranks = start_ranks(Workspace(tmp_path), 2, "6", (*PROGRAM, "hang"))
    try:
        together = lambda: all("TOGETHER" in log.read_text() for log in ranks.logs)  # noqa: E731
        wait_for(together, ranks.said, of=ranks.processes[0])
        time.sleep(0.5)
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.processes[0].wait(PATIENCE_S) == 128 + signal.SIGTERM, ranks.said()
        ranks.processes[1].send_signal(signal.SIGTERM)
        assert ranks.processes[1].wait(PATIENCE_S) == 128 + signal.SIGTERM, ranks.said()
    finally:
        ranks.kill()
