"""The sbatch templates, without Slurm: they parse, have the headers people edit, and answer misuse with a usage."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl import recipes
from hpc_rl.config import Config, from_json, load, to_json
from hpc_rl.orchestrate import round_plan

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "slurm_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.sbatch"))
DEFAULT_STAGES = {"serve": '""', "train_torchrun": "train"}


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
    assert set(TEMPLATES) == {"prepare", "serve", "sample", "grade", "train", "train_torchrun", "evaluate"}


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
    assert '-m jobs --workspace "$WORKSPACE" --round "$ROUND" --stage "$STAGE"' in text
    assert f"begin {name} {DEFAULT_STAGES.get(name, name)} " in text
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
    stage = "STAGE" if name == "serve" else "[STAGE]"
    assert f"usage: sbatch slurm_templates/{name}.sbatch WORKSPACE ROUND {stage}\n" in result.stderr


def test_a_service_must_be_named(workspace: Path) -> None:
    result = run("serve.sbatch", str(workspace), "1")
    assert result.returncode == 64
    assert "serve.sbatch WORKSPACE ROUND STAGE" in result.stderr


def test_a_folder_without_a_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for result in (run("sample.sbatch", str(tmp_path), "1"), run("round.sh", str(tmp_path), "1")):
        assert result.returncode == 64
        assert f"python -m hpc_rl.launch CONFIG --workspace {tmp_path} --init" in result.stderr


def test_a_submission_from_another_folder_is_refused(tmp_path: Path) -> None:
    result = run("sample.sbatch", str(tmp_path), "1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 64
    assert "from the repository's folder" in result.stderr


def make_workspace(folder: Path, config: Config) -> Path:
    """What `launch --init` leaves, as far as round.sh reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "training_config.json").write_text(json.dumps(to_json(config)))
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "lewis", load("configs/lewis.yaml", env={}, cwd=REPOSITORY))


@pytest.fixture
def prosetting(tmp_path: Path) -> Callable[..., Path]:
    """Makes a workspace of the second recipe, with `--set` values."""
    (tmp_path / "run.yaml").write_text(
        "recipe: prosetting\nrun: {name: a}\nsolver: {path: m}\nquestions: {file: q.json}\ntrain_start_round: 2\n"
    )
    return lambda *settings: make_workspace(tmp_path / "pro", load("run.yaml", settings, env={}, cwd=tmp_path))


def chain(workspace: Path, *arguments: str) -> dict[str, str]:
    """What `round.sh --dry-run` would submit: job name → its sbatch command."""
    result = run("round.sh", "--dry-run", str(workspace), *arguments, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    commands = [line.replace("\\", "") for line in result.stdout.splitlines()]
    return {re.search(r"--job-name=(\S+)", line)[1]: line for line in commands}  # type: ignore[index]


def dependency(command: str) -> str | None:
    found = re.search(r"--dependency=(\S+)", command)
    return found and found[1]


def dependencies(commands: dict[str, str]) -> dict[str, str | None]:
    return {name: dependency(line) for name, line in commands.items()}


def templates(commands: dict[str, str]) -> dict[str, str]:
    return {name: line.split()[-4].removeprefix("slurm_templates/") for name, line in commands.items()}


def test_round_chains_the_stages(workspace: Path) -> None:
    commands = chain(workspace, "3")
    assert dependencies(commands) == {
        "sample": None,
        "grade.listener": "afterany:ID_OF_sample",
        "grade": "afterany:ID_OF_sample,after:ID_OF_grade.listener",
        "train": "afterany:ID_OF_grade",
        "evaluate.listener": "afterany:ID_OF_train",
        "evaluate": "afterany:ID_OF_train,after:ID_OF_evaluate.listener",
    }
    own = {name: f"{name}.sbatch" for name in ("sample", "grade", "train", "evaluate")}
    assert templates(commands) == own | {"grade.listener": "serve.sbatch", "evaluate.listener": "serve.sbatch"}


def test_round_zero_prepares(workspace: Path) -> None:
    commands = chain(workspace, "0")
    assert dependencies(commands) == {
        "prepare": None,
        "dataset": "afterany:ID_OF_prepare",
        "evaluate.listener": "afterany:ID_OF_dataset",
        "evaluate": "afterany:ID_OF_dataset,after:ID_OF_evaluate.listener",
    }
    assert templates(commands)["dataset"] == "grade.sbatch"


def test_live_rollouts_need_only_the_listener_and_the_trainer(tmp_path: Path) -> None:
    live = load("configs/lewis.yaml", ["train.rollouts=live"], env={}, cwd=REPOSITORY)
    commands = chain(make_workspace(tmp_path / "live", live), "2", "--after", "41")
    assert dependency(commands["train.listener"]) == "afterany:41"
    assert dependency(commands["train"]) == "afterany:41,after:ID_OF_train.listener"
    assert "sample" not in commands


def test_rounds_of_the_other_recipe_are_chained_by_what_it_says(prosetting: Callable[..., Path]) -> None:
    workspace = prosetting("dpo.reference=stage")
    assert dependencies(chain(workspace, "0")) == {"pool": None, "evaluate": "afterany:ID_OF_pool"}
    first = {
        "collect": "afterany:41:42",
        "grade.teacher": "afterany:ID_OF_collect",
        "grade": "afterany:ID_OF_collect,after:ID_OF_grade.teacher",
        "dpo_data": "afterany:ID_OF_grade",
        "enhance.teacher": "afterany:ID_OF_grade",
        "enhance": "afterany:ID_OF_grade,after:ID_OF_enhance.teacher",
        "pool": "afterany:ID_OF_grade:ID_OF_enhance",
    }
    assert dependencies(chain(workspace, "1", "--after", "41:42")) == first
    second = chain(workspace, "2", "--after", "41:42", "--tasks", "5")
    assert dependencies(second) == first | {
        "reference": "afterany:ID_OF_dpo_data",
        "train": "afterany:ID_OF_dpo_data:ID_OF_reference",
        "evaluate": "afterany:ID_OF_train",
    }
    assert [name for name, line in second.items() if "--array=0-4 " in line] == ["collect"]
    assert templates(second) == {
        "collect": "sample.sbatch",
        "grade.teacher": "serve.sbatch",
        "grade": "grade.sbatch",
        "dpo_data": "grade.sbatch",
        "reference": "sample.sbatch",
        "train": "train.sbatch",
        "evaluate": "evaluate.sbatch",
        "enhance.teacher": "serve.sbatch",
        "enhance": "grade.sbatch",
        "pool": "grade.sbatch",
    }


def test_somebody_elses_endpoint_is_not_served(prosetting: Callable[..., Path]) -> None:
    assert not [name for name in chain(prosetting(TEACHER), "1") if "teacher" in name]


TEACHER = "services.teacher.client.url=http://teacher:8000/v1"


def plan_of(workspace: Path, round: int) -> list[round_plan.Planned]:
    config = from_json(json.loads((workspace / "training_config.json").read_text()))
    return [*round_plan.plan(recipes.graph_of(config), round)]


@pytest.mark.parametrize("generator", ["null", "{path: g}"])
@pytest.mark.parametrize("round", [0, 1, 2])
def test_the_next_round_begins_after_all_that_it_needs_of_this_one(
    prosetting: Callable[..., Path], round: int, generator: str
) -> None:
    workspace = prosetting(TEACHER, f"generator={generator}")
    config = from_json(json.loads((workspace / "training_config.json").read_text()))
    needed = {
        need.name for stage in recipes.load("prosetting").stages(config, round + 1) for need in stage.needs
        if need.round == round
    }  # fmt: skip
    assert {planned.name for planned in plan_of(workspace, round) if planned.next} == needed
    assert "evaluate" not in needed


def test_a_service_in_its_consumers_job_is_a_job_of_its_own_here(prosetting: Callable[..., Path]) -> None:
    apart = plan_of(prosetting(), 1)
    together = plan_of(prosetting("services.teacher.placement=hetjob"), 1)
    assert together == apart


def test_a_template_of_the_stages_own_is_taken(prosetting: Callable[..., Path], tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(FOLDER, repository / "slurm_templates")
    (repository / "hpc_rl").symlink_to(REPOSITORY / "hpc_rl")
    (repository / "slurm_templates/enhance.sbatch").touch()
    command = ["bash", str(repository / "slurm_templates/round.sh"), "--dry-run", str(prosetting(TEACHER)), "1"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "slurm_templates/enhance.sbatch" in said.replace("\\", "")
    assert said.count("slurm_templates/grade.sbatch") == 3


def test_a_round_that_the_run_does_not_have_is_refused_with_the_way_out(workspace: Path) -> None:
    result = run("round.sh", str(workspace), "9", "--dry-run", PYTHON=sys.executable)
    assert result.returncode == 64
    assert "has rounds 0 to 4, and not 9" in result.stderr
    assert "--set run.rounds=9" in result.stderr


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
    [
        *([], ["one"], ["{}", "two"], ["{}", "1", "--tasks", "0"], ["{}", "1", "--tasks"], ["{}", "1", "--what"]),
        *(["{}", "1", "--after", "train"], ["{}", "1", "--after", "41:"]),
    ],
)
def test_round_answers_misuse(workspace: Path, arguments: list[str]) -> None:
    result = run("round.sh", *(argument.format(workspace) for argument in arguments))
    assert result.returncode == 64
    assert result.stderr.startswith("round.sh: ")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o755), (0o027, 0o750)])
def test_others_do_not_write_to_what_a_template_makes(workspace: Path, umask: int, mode: int) -> None:
    begin = f'REPO=/nowhere; source {FOLDER}/common.sh; begin sample sample "{workspace}" 1; mkdir "$WORKSPACE/made"'
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"}
    subprocess.run(["bash", "-c", begin], env=environment, umask=umask, check=True, capture_output=True)
    for folder in ("made", "logs/round_01/sample"):
        assert stat.S_IMODE((workspace / folder).stat().st_mode) == mode
