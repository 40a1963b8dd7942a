"""Ranks and hosts from Slurm's variables."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.rendezvous import first_host, rank_environment


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("gpu[007,100-200]", "gpu007"),
        ("n[1-4]-ib", "n1-ib"),
        ("n[1-4]-ib,m3", "n1-ib"),
        ("rack[1-2]node[01-03]", "rack1node01"),
        ("r[2,4]n[5-6]c[0-1].site.org", "r2n5c0.site.org"),
        ("a-b.c_d,e", "a-b.c_d"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "16",
}


def test_ranks_come_from_the_step() -> None:
    assert rank_environment(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "HPC_RL_JOB_ID": "12",
        "HPC_RL_RESTART": "0",
        "HPC_RL_NODELIST_HEAD": "node3",
    }


def test_a_batch_script_of_a_job_with_many_tasks_is_rank_0_of_1() -> None:
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "node[1-4]"}
    for step in ({}, {"SLURM_STEP_ID": "4294967291"}):
        found = rank_environment({**batch, **step})
        assert (found["RANK"], found["WORLD_SIZE"], found["HPC_RL_NODELIST_HEAD"]) == ("0", "1", "node1")


def test_an_array_element_is_named_after_the_array() -> None:
    found = rank_environment(
        {**STEP, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
    )
    assert (found["HPC_RL_JOB_ID"], found["HPC_RL_RESTART"]) == ("10_2", "1")


def test_what_is_set_already_wins() -> None:
    found = rank_environment({**STEP, "RANK": "1", "WORLD_SIZE": "2"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")


def test_outside_of_any_job_there_is_one_rank() -> None:
    found = rank_environment({})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["HPC_RL_JOB_ID"]) == (
        "0",
        "1",
        "1",
        "",
    )
