"""The sbatch templates, without Slurm: they parse, have the headers people edit, and answer misuse with a usage."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "slurm_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.sbatch"))
OTHERS = {"listener": "jobs.serve", "train_torchrun": "jobs.train"}
JOBS = {name: OTHERS.get(name, f"jobs.{name}") for name in TEMPLATES}


def headers(name: str) -> dict[str, str]:
    """The #SBATCH options of a template, the ones that wait to be edited (##SBATCH) included."""
    lines = re.findall(r"^##?SBATCH --(\S+)", (FOLDER / f"{name}.sbatch").read_text(), flags=re.MULTILINE)
    return {option: value for option, _, value in (line.partition("=") for line in lines)}


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A template as Slurm would run it: as a job, from a copy elsewhere."""
    job = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    environment = {"PATH": os.environ["PATH"]} | job | variables
    command = ["bash", str(FOLDER / script), *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def test_all_are_there() -> None:
    assert set(TEMPLATES) == {"prepare", "listener", "sample", "grade", "train", "train_torchrun", "evaluate"}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_is_valid_shell(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (tests/slurm/install.sh)")
def test_shellcheck_has_no_complaints() -> None:
    scripts = [str(path) for path in sorted(FOLDER.iterdir())] + [str(REPOSITORY / "tests/slurm/install.sh")]
    command = ["shellcheck", "--external-sources", *scripts]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.parametrize("name", TEMPLATES)
def test_has_the_headers_that_people_edit(name: str) -> None:
    found = headers(name)
    assert {"account", "partition", "time", "nodes", "ntasks-per-node", "cpus-per-task", "mem"} <= set(found)
    assert "requeue" in found
    assert found["open-mode"] == "append"  # else a requeue truncates the log
    assert found["job-name"] == name
    assert ("gpus-per-node" in found) == (name != "grade")
    assert ("array" in found) == (name == "sample")


@pytest.mark.parametrize("name", TEMPLATES)
def test_runs_the_same_job_body_as_the_launcher(name: str) -> None:
    text = (FOLDER / f"{name}.sbatch").read_text()
    assert f"-m {JOBS[name]} --workspace" in text
    # srun does not inherit --cpus-per-task since Slurm 22.05 (srun(1))
    assert len(re.findall(r"^[^#\n]*srun", text, flags=re.MULTILINE)) == text.count('srun --cpus-per-task="$SLURM')


def test_train_has_one_rank_per_gpu_and_spares_slow_ranks() -> None:
    assert headers("train")["ntasks-per-node"] == headers("train")["gpus-per-node"]
    text = (FOLDER / "train.sbatch").read_text()
    assert "--kill-on-bad-exit=1" in text
    assert "--wait=0" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_missing_arguments_are_answered_with_the_usage(name: str) -> None:
    result = run(f"{name}.sbatch")
    assert result.returncode == 64
    assert f"usage: sbatch slurm_templates/{name}.sbatch WORKSPACE ROUND" in result.stderr


def test_a_folder_without_a_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for result in (run("sample.sbatch", str(tmp_path), "1"), run("round.sh", str(tmp_path), "1")):
        assert result.returncode == 64
        assert f"python -m hpc_rl.launch CONFIG --workspace {tmp_path} --init" in result.stderr


def test_a_submission_from_another_folder_is_refused(tmp_path: Path) -> None:
    result = run("sample.sbatch", str(tmp_path), "1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 64
    assert "from the repository's folder" in result.stderr


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "training_config.json").write_text("{}")
    return tmp_path


def chain(workspace: Path, *arguments: str) -> dict[str, str]:
    """What `round.sh --dry-run` would submit: job name → its sbatch command."""
    result = run("round.sh", "--dry-run", str(workspace), *arguments)
    assert result.returncode == 0, result.stderr
    commands = [line.replace("\\", "") for line in result.stdout.splitlines()]
    return {re.search(r"--job-name=(\S+)", line)[1]: line for line in commands}  # type: ignore[index]


def dependency(command: str) -> str | None:
    found = re.search(r"--dependency=(\S+)", command)
    return found and found[1]


def test_round_chains_the_stages(workspace: Path) -> None:
    assert {name: dependency(line) for name, line in chain(workspace, "3").items()} == {
        "sample": None,
        "grade.listener": "afterany:ID_OF_sample",
        "grade": "afterany:ID_OF_sample,after:ID_OF_grade.listener",
        "train": "afterany:ID_OF_grade",
        "evaluate.listener": "afterany:ID_OF_train",
        "evaluate": "afterany:ID_OF_train,after:ID_OF_evaluate.listener",
    }


def test_round_zero_prepares(workspace: Path) -> None:
    assert {name: dependency(line) for name, line in chain(workspace, "0").items()} == {
        "prepare": None,
        "evaluate.listener": "afterany:ID_OF_prepare",
        "evaluate": "afterany:ID_OF_prepare,after:ID_OF_evaluate.listener",
    }


def test_live_rollouts_need_only_the_listener_and_the_trainer(workspace: Path) -> None:
    commands = chain(workspace, "2", "--live", "--after", "41")
    assert dependency(commands["train.listener"]) == "afterany:41"
    assert dependency(commands["train"]) == "afterany:41,after:ID_OF_train.listener"
    assert "sample" not in commands


def test_options_reach_sbatch(workspace: Path) -> None:
    commands = chain(workspace, "1", "--tasks", "32", "--", "--account=abc123", "--partition=gpu")
    assert "--array=0-31 " in commands["sample"]
    assert all("--account=abc123 --partition=gpu " in line for line in commands.values())
    assert commands["evaluate.listener"].split()[-3:] == [str(workspace), "1", "evaluate.listener"]


def test_dry_run_writes_nothing(workspace: Path) -> None:
    chain(workspace, "1")
    assert [path.name for path in workspace.iterdir()] == ["training_config.json"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["one"], ["{}", "two"], ["{}", "1", "--tasks", "0"], ["{}", "1", "--tasks"], ["{}", "1", "--what"]],
)
def test_round_answers_misuse(workspace: Path, arguments: list[str]) -> None:
    result = run("round.sh", *(argument.format(workspace) for argument in arguments))
    assert result.returncode == 64
    assert result.stderr.startswith("round.sh: ")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o755), (0o027, 0o750)])
def test_others_do_not_write_to_what_a_template_makes(workspace: Path, umask: int, mode: int) -> None:
    begin = f'REPO=/nowhere; source {FOLDER}/common.sh; begin sample "{workspace}" 1; mkdir "$WORKSPACE/made"'
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"}
    subprocess.run(["bash", "-c", begin], env=environment, umask=umask, check=True, capture_output=True)
    for folder in ("made", "logs/round_01/sample"):
        assert stat.S_IMODE((workspace / folder).stat().st_mode) == mode
