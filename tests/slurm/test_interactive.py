"""`launch --interactive` and pauses between attempts on a real cluster (S11, S12)."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.cluster.slurm import SlurmExecutor
from tests.cluster.test_scripts import GRADE, LISTENER, request, together
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import REPOSITORY, ClusterRun

FAST = ("run.lease_ttl_s=3", "run.gate_patience_s=2", "run.rounds=2", "run.lookahead=2")


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path) -> Iterator[ClusterRun]:
    yield ClusterRun(cluster, tmp_path / "run", "benchmarks/noop.yaml", FAST)
    shutil.rmtree(tmp_path, ignore_errors=True)


def type_in(run: ClusterRun, letters: str) -> subprocess.CompletedProcess[str]:
    """An interactive launch on the login host, with these lines in its pipe."""
    launch = f"printf {shlex.quote(letters)} | {shlex.join(run.launch_command('--interactive'))}"
    return run.cluster.run(["bash", "-c", launch], cwd=REPOSITORY, env=run.env, check=False, timeout_s=600)


@pytest.mark.slow
def test_a_round_that_a_person_asks_for_leaves_nothing_in_the_queue_that_goes_on_by_itself(run: ClusterRun) -> None:
    """S12. tests/test_interactive.py has it without Slurm."""
    run.launch()
    refused = type_in(run, "c\n")
    assert refused.returncode == 0 and "already running: Slurm jobs" in refused.stdout, refused.stdout + refused.stderr
    run.tool("hpc_rl.cancel")
    before = run.submissions()
    played = type_in(run, "s\nc\n")
    assert played.returncode == 0, played.stdout + played.stderr
    assert "Current Round: 2" in played.stdout
    assert run.manifests(1, "evaluate") and not run.manifests(2, "sample")
    added = run.submissions() - before
    assert {round for round, _ in added} == {1} and (1, "advance") not in added
    assert not run.cluster.queue()
    run.launch()
    run.wait_until_finished()
    assert run.submissions()[2, "evaluate"] == before[2, "evaluate"] + 1


def test_a_job_of_several_components_waits_as_a_whole_where_its_first_is_to_wait(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """S11: the interval between retries."""
    both = together(request(GRADE, {}, delay_s=600.0), request(LISTENER, {}, companion=True))
    (script,) = SlurmExecutor(1000).render(both)
    (tmp_path / "job.sh").write_text(script.replace("/data/runs/lewis", str(tmp_path)))
    (tmp_path / "logs" / "round_02" / "grade").mkdir(parents=True)
    job_id = cluster.sbatch(str(tmp_path / "job.sh"))
    try:
        waiting = cluster.queue()
        assert len(waiting) == 2 and {job.state for job in waiting} == {"PENDING"}
        assert "BeginTime" in {job.reason for job in waiting}
    finally:
        cluster.run(["scancel", job_id])
