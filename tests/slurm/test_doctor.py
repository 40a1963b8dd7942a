"""`doctor` on a real cluster: what Slurm says of the resources of stages (S14)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import REPOSITORY

CONFIG = "benchmarks/noop.yaml"

Found = list[tuple[str, str]]


def doctor(cluster: SlurmCluster, folder: Path, *settings: str, quick: bool = False) -> Found:
    """Level and words of the findings on Slurm, asked on the login host."""
    command = [sys.executable, "-m", "hpc_rl.doctor", CONFIG, "--json", "--workspace", str(folder / "run")]
    command += [*(["--quick"] if quick else []), *(part for setting in settings for part in ("--set", setting))]
    said = cluster.run(command, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert said.stdout, said.stderr
    found = json.loads(said.stdout)
    assert said.returncode == any(one["level"] == "problem" for one in found), said.stdout
    return [(one["level"], one["what"]) for one in found if one["area"] == "Slurm"]


@pytest.mark.parametrize("quick", [True, False])
def test_s14_a_run_that_the_cluster_can_carry(cluster: SlurmCluster, tmp_path: Path, quick: bool) -> None:
    found = doctor(cluster, tmp_path, quick=quick)
    assert {level for level, _ in found} == {"ok"}, found
    assert ("sbatch would take the jobs of 6 stages (--test-only)" in [what for _, what in found]) != quick
    assert not cluster.queue(), "nothing was submitted"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages.sample.gpus_per_node=64", "stages.sample.gpus_per_node: no node of partition"),
        ("stages.train.nodes=50", "stages.train.nodes is 50"),
        ("stages.grade.partition=nowhere", "Slurm has no partition 'nowhere'"),
        ("stages.grade.sbatch={nodelist: nowhere}", "nvalid node name"),  # only sbatch itself knows that
    ],
)
def test_what_the_cluster_cannot_carry_is_named(cluster: SlurmCluster, tmp_path: Path, setting: str, said: str) -> None:
    problems = [what for level, what in doctor(cluster, tmp_path, setting) if level == "problem"]
    assert any(said in what for what in problems), problems
