"""The sbatch templates on a real cluster: submitted as people submit them, interrupted, a whole round by round.sh."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from tests.slurm.cluster import SlurmCluster
from tests.slurm.hosts import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--cpus-per-task=1", "--mem=200M")  # the headers' sizes are those of real models

BODY = """
import os, sys, time
from pathlib import Path
def say(text):
    print(text, flush=True)
say(f"round {sys.argv[sys.argv.index('--round') + 1]}, task {os.environ.get('SLURM_ARRAY_TASK_ID')}, rank "
    f"{os.environ['SLURM_PROCID']} of {os.environ['SLURM_NTASKS']}, {os.environ['SLURM_CPUS_PER_TASK']} CPUs")
say(f"ends {os.environ.get('SLURM_JOB_END_TIME')}")
first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
if first and Path("wait").exists():
    time.sleep(600)
sys.exit(int(Path("status").read_text()) if first and Path("status").exists() else 0)
"""
ALL_HAVE_SAID = """
Path("said", os.environ["RANK"]).touch()
while len(os.listdir("said")) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.1)
sys.exit"""
"""The first rank that ends has its siblings ended by torchrun, whatever they were about to say."""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The templates with job bodies that say who they are: what is tested is the templates' own part."""
    folder = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "slurm_templates", folder / "slurm_templates")
    (folder / "jobs").mkdir()
    (folder / "jobs/__init__.py").touch()
    (folder / "jobs/__main__.py").write_text(BODY)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "a workspace"
    folder.mkdir()
    (folder / "training_config.json").write_text("{}")
    return folder


def test_a_template_logs_into_the_workspace(cluster: SlurmCluster, repository: Path, workspace: Path) -> None:
    options = (*SMALL, "--array=3,5", "--cpus-per-task=2", "--gpus-per-node=1")
    job = cluster.sbatch(*options, "slurm_templates/sample.sbatch", str(workspace), "07", cwd=repository)
    cluster.wait_for_empty_queue()
    for task in (3, 5):
        log = (workspace / f"logs/round_07/sample/{job}_{task}-0.out").read_text()
        assert f"round 7, task {task}, rank 0 of 1, 2 CPUs" in log


def test_a_sampling_job_knows_when_its_limit_strikes_and_goes_back_into_the_queue_for_want_of_time(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    (repository / "status").write_text("124")
    options = (*SMALL, "--array=0", "--time=7")
    job = cluster.sbatch(*options, "slurm_templates/sample.sbatch", str(workspace), "1", cwd=repository)
    log = workspace / f"logs/round_01/sample/{job}_0-0.out"
    wait_for(lambda: log.exists() and "ends" in log.read_text(), "the body to run")
    ends = next(line for line in log.read_text().splitlines() if line.startswith("ends"))
    assert 390 < float(ends.split()[1]) - log.stat().st_mtime < 430
    wait_for(lambda: [(q.state, q.reason) for q in cluster.queue()] == [("PENDING", "BeginTime")], "it to be requeued")
    cluster.start_now(f"{job}_0")
    cluster.wait_for_state(f"{job}_0", "COMPLETED")
    assert "status 124" in log.read_text()


def test_each_element_of_an_array_knows_when_its_limit_strikes(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    """The last element has the array's own id as its SLURM_JOB_ID, by which squeue lists all of them."""
    (repository / "wait").touch()
    options = (*SMALL, "--array=0-1", "--time=7")
    job = cluster.sbatch(*options, "slurm_templates/sample.sbatch", str(workspace), "1", cwd=repository)
    logs = [workspace / f"logs/round_01/sample/{job}_{task}-0.out" for task in (0, 1)]
    wait_for(lambda: all(log.exists() and "\nends" in log.read_text() for log in logs), "both elements to run")
    for log in logs:
        ends = next(line for line in log.read_text().splitlines() if line.startswith("ends"))
        assert 390 < float(ends.split()[1]) - log.stat().st_mtime < 430, log.read_text()
    cluster.run(["scancel", job])
    cluster.wait_for_empty_queue()


def test_a_service_submitted_as_an_array_is_as_many_replicas(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    template = ("slurm_templates/serve.sbatch", str(workspace), "1", "grade.listener")
    job = cluster.sbatch(*SMALL, "--array=0-1", *template, cwd=repository)
    cluster.wait_for_empty_queue()
    for task in (0, 1):
        log = (workspace / f"logs/round_01/grade.listener/{job}_{task}-0.out").read_text()
        assert f"round 1, task {task}, rank 0 of 1" in log


def test_train_starts_a_rank_per_gpu_on_every_node(cluster: SlurmCluster, repository: Path, workspace: Path) -> None:
    options = (*SMALL, "--ntasks-per-node=2", "--gpus-per-node=2")
    job = cluster.sbatch(*options, "slurm_templates/train.sbatch", str(workspace), "1", cwd=repository)
    cluster.wait_for_state(job, "COMPLETED")
    log = (workspace / f"logs/round_01/train/{job}-0.out").read_text()
    assert sorted(line[:2] for line in log.splitlines() if "rank" in line) == ["0:", "1:", "2:", "3:"]


def test_the_rank_that_fails_first_says_how_a_training_ended(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    """The others are told to leave by srun, and leaving as they do in a preemption would have the job run again."""
    (repository / "jobs/__main__.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "time.sleep(1 if os.environ['SLURM_PROCID'] == '1' else 600)\nsys.exit(3)\n"
    )
    options = (*SMALL, "--ntasks-per-node=2", "--gpus-per-node=2")
    job = cluster.sbatch(*options, "slurm_templates/train.sbatch", str(workspace), "1", cwd=repository)
    assert cluster.wait_for_state(job, "FAILED")["ExitCode"] == "3:0"
    assert "ended with status 3" in (workspace / f"logs/round_01/train/{job}-0.out").read_text()


def test_torchrun_starts_the_same_ranks_and_what_they_end_with_is_the_jobs(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    (repository / "status").write_text("75")
    (repository / "hpc_rl").symlink_to(REPOSITORY / "hpc_rl")
    (repository / "jobs/__main__.py").write_text(
        BODY.replace("SLURM_PROCID", "RANK").replace("SLURM_NTASKS", "WORLD_SIZE").replace("sys.exit", ALL_HAVE_SAID)
    )
    (repository / "said").mkdir()
    environment = {"PATH": f"{Path(sys.executable).parent}:{cluster.env()['PATH']}"}
    template = ("slurm_templates/train_torchrun.sbatch", str(workspace), "1")
    job = cluster.sbatch(*SMALL, "--gpus-per-node=2", *template, cwd=repository, env=environment)
    assert cluster.wait_for_state(job, "FAILED")["ExitCode"] == "75:0"
    log = (workspace / f"logs/round_01/train/{job}-0.out").read_text()
    assert sorted(re.findall(r"rank (\d) of 4", log)) == ["0", "1", "2", "3"] and "blocked" in log


def test_a_blocked_job_says_so_and_fails(cluster: SlurmCluster, repository: Path, workspace: Path) -> None:
    (repository / "status").write_text("75")
    template = ("slurm_templates/serve.sbatch", str(workspace), "1", "grade.listener")
    job = cluster.sbatch(*SMALL, *template, cwd=repository)
    assert cluster.wait_for_state(job, "FAILED")["ExitCode"] == "75:0"
    assert "blocked" in (workspace / f"logs/round_01/grade.listener/{job}-0.out").read_text()


def test_a_preempted_element_that_leaves_at_once_is_requeued_alone(
    cluster: SlurmCluster, repository: Path, workspace: Path
) -> None:
    """Slurm itself would not: a job that ends within the partition's GraceTime is over (docs/testing.md)."""
    (repository / "wait").touch()
    job = cluster.sbatch(
        *(*SMALL, "--array=0-1", "--partition=low", "--nodelist=node1", "--cpus-per-task=2"),
        *("slurm_templates/sample.sbatch", str(workspace), "1"),
        cwd=repository,
    )
    logs = [workspace / f"logs/round_01/sample/{job}_{task}-0.out" for task in (0, 1)]
    wait_for(lambda: all(log.exists() and "rank" in log.read_text() for log in logs), "both elements to work")
    options = ("--partition=high", "--nodelist=node1", "--cpus-per-task=2", "--mem=1G")
    urgent = cluster.sbatch(*options, "--wrap=true", cwd=repository)
    cluster.wait_for_state(urgent, "COMPLETED")
    wait_for(lambda: any("status 143" in log.read_text() for log in logs), "one element to be preempted")
    left, stayed = sorted((0, 1), key=lambda task: "status 143" not in logs[task].read_text())
    cluster.wait_for_state(f"{job}_{left}", "COMPLETED")
    assert "rank" in (workspace / f"logs/round_01/sample/{job}_{left}-1.out").read_text()
    assert cluster.job(f"{job}_{stayed}")["Restarts"] == "0"


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, repository: Path, workspace: Path) -> None:
    (repository / "wait").touch()
    job = cluster.sbatch(*SMALL, "--array=0", "slurm_templates/sample.sbatch", str(workspace), "1", cwd=repository)
    log = workspace / f"logs/round_01/sample/{job}_0-0.out"
    wait_for(lambda: log.exists() and "rank" in log.read_text(), "the job to work")
    cluster.run(["scancel", job])
    assert cluster.wait_for_state(job, "CANCELLED", "COMPLETED", "FAILED")["JobState"] == "CANCELLED"
    cluster.wait_for_empty_queue()


def two_rounds(cluster: SlurmCluster, workspace: Path, config: str, *settings: str) -> Workspace:
    """`launch --init`, then nothing but sbatch: the preparation and a round, submitted at once and chained."""
    init = [sys.executable, "-m", "hpc_rl.launch", config, "--workspace", str(workspace), "--init"]
    cluster.run([*init, *(part for setting in settings for part in ("--set", setting))], cwd=REPOSITORY, timeout_s=300)
    # the headers' sizes are those of real models and real nodes
    here = ("--", "--cpus-per-task=1", "--mem=1500M", "--gpus-per-node=1", "--ntasks-per-node=1", "--time=20")
    environment = {"PATH": f"{Path(sys.executable).parent}:{cluster.env()['PATH']}", "OMP_NUM_THREADS": "1"}

    def submit(round: int, *options: str) -> tuple[list[str], str]:
        """The ids of a round's jobs, and what the next one is to wait for."""
        command = ["slurm_templates/round.sh", *options, str(workspace), str(round), *here]
        said = cluster.run(command, cwd=REPOSITORY, env=environment).stdout
        after = re.search(r"--after (\S+)", said)
        return [line.split()[1] for line in said.partition("\n\n")[0].splitlines()], after[1] if after else ""

    first, after = submit(0)
    second, _ = submit(1, "--tasks", "3", "--after", after)
    cluster.wait_for_empty_queue(timeout_s=600)
    states = {job: cluster.state(job) for job in (*first, *second)}
    assert set(states.values()) == {"COMPLETED"}, _logs(workspace)
    return Workspace(workspace)


@pytest.mark.slow
def test_two_rounds_without_the_launcher(cluster: SlurmCluster, tmp_path: Path) -> None:
    ws = two_rounds(
        *(cluster, tmp_path / "workspace", "tests/slurm/lewis.yaml"),
        *("sample.engine=transformers", "sample.prompts_per_round=16", "sample.samples_per_prompt=4"),
        *("data.categories=[ring, square]", "data.scenes.views_train=4", "data.scenes.views_test=4"),
        *("sample.shard_size=4", "data.train_rows=64", "data.eval_rows={new_views: 24, validation: 24}"),
    )
    assert manifest.read(ws, 0, "evaluate", 0).metrics["n_validation"] == 24
    assert [len(manifest.done_shards(ws, 1, stage)) for stage in ("sample", "grade", "evaluate")] == [4, 4, 1]
    assert manifest.read(ws, 1, "train", 0).metrics["ranks"] == 2


@pytest.mark.slow
def test_two_rounds_of_the_other_recipe_without_the_launcher(cluster: SlurmCluster, tmp_path: Path) -> None:
    ws = two_rounds(
        *(cluster, tmp_path / "workspace", "configs/tiny/prosetting.yaml"),
        *("cluster.executor=slurm", "cluster.allow_local_workspace=true", "cluster.allow_no_gpu=true"),
        *("run.rounds=1", "train_start_round=1", "dpo.epochs=1", "dpo.per_device_batch_size=16"),
        *("sample.engine=transformers", "sample.shards=3", "stages.train.nodes=2"),
    )
    done = {stage: len(manifest.done_shards(ws, 1, stage)) for stage in ("collect", "grade", "enhance", "pool")}
    assert done == {"collect": 3, "grade": 3, "enhance": 3, "pool": 1}
    assert manifest.read(ws, 1, "train", 0).metrics["ranks"] == 2
    assert manifest.read(ws, 1, "evaluate", 0).metrics["n_held_out"] == 400


def _logs(workspace: Path) -> str:
    """The end of every job's log, for the report of a failure."""
    logs = sorted((workspace / "logs").rglob("*.out"))
    return "\n".join(f"--- {log.relative_to(workspace)}\n{log.read_text()[-600:]}" for log in logs)
