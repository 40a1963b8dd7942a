"""The exact sbatch scripts, as files: any change of them is seen in review. `UPDATE_GOLDEN=1` writes them anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.cluster.base import JobRequest
from hpc_rl.cluster.slurm import SlurmExecutor
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.orchestrate.requests import build_request
from hpc_rl.run.workspace import Workspace

GOLDEN = Path(__file__).parent / "golden"

SAMPLE = Stage(StageId(2, "sample"), "jobs.sample", Kind.ARRAY, shards=7)
TRAIN = Stage(StageId(2, "train"), "jobs.train", Kind.MULTINODE)
EVALUATE = Stage(StageId(2, "evaluate"), "jobs.lewis.evaluate", Kind.SINGLE)
LISTENER = Stage(StageId(2, "grade.listener"), "jobs.serve", Kind.SERVICE, shards=0, serves=(StageId(2, "grade"),))
GRADE = Stage(StageId(2, "grade"), "jobs.lewis.grade", Kind.ARRAY, shards=7, uses=(LISTENER.id,))


def request(
    stage: Stage,
    resources: Mapping[str, Any],
    cluster: Mapping[str, Any] | None = None,
    companion: bool = False,
    delay_s: float = 0.0,
    **after: tuple[str, ...],
) -> JobRequest:
    config = Config.model_validate(
        {
            "recipe": "benchmarks.noop_recipe",
            "run": {"name": "lewis", "workspace": "/data/runs/lewis"},
            "cluster": cluster or {},
            "stages": {stage.name: resources},
        }
    )
    ws = Workspace(config.run.workspace)
    name = f"lewis-r{stage.round:02d}-{stage.name}-a1-abc123"
    code = ws.code_dir / "c0de"
    return build_request(ws, config, stage, name, "slurm", code, companion=companion, delay_s=delay_s, **after)


def together(leader: JobRequest, *others: JobRequest) -> JobRequest:
    return replace(leader, beside=others)


SITE = {
    "partition": "gpu",
    "account": "proj42",
    "qos": "long",
    "constraint": "a100|h100",
    "setup": ["module load cuda/12", "source /opt/env/bin/activate"],
    "sbatch": {"exclude": "node13", "exclusive": True, "mail_type": "FAIL"},
    "signal_delay_s": 300,
}

CASES = {
    "single": request(EVALUATE, {"cpus_per_task": 4, "mem_gb": 1.5, "time_min": 90}),
    "array": request(SAMPLE, {"tasks": 4, "gpus_per_node": 1, "cpus_per_task": 8}, after_end=("41", "42")),
    "after_a_failure": request(EVALUATE, {}, delay_s=90.5),
    "array_of_one": request(SAMPLE, {"tasks": 1}),
    "array_with_more_tasks_than_shards": request(SAMPLE, {"tasks": 100}),
    "array_beyond_max_array_size": request(SAMPLE, {"tasks": 7}),
    "multi_node": request(TRAIN, {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 6, "mem_gb": 256}),
    "multi_node_on_cpus": request(TRAIN, {"nodes": 2, "ranks_per_node": 2, "cpus_per_task": 2}),
    "service": request(LISTENER, {"gpus_per_node": 1}, after_end=("51",)),
    "replicas": request(LISTENER, {"gpus_per_node": 1, "tasks": 3}, after_end=("51",)),
    "after_a_service": request(GRADE, {"tasks": 2}, after_end=("51",), after_start=("52",)),
    "after_the_first_replica": request(GRADE, {"tasks": 2}, after_end=("51",), after_start=("52_0",)),
    "hetjob": together(
        request(GRADE, {"cpus_per_task": 4}, after_end=("51",)),
        request(LISTENER, {"gpus_per_node": 1, "mem_gb": 64, "setup": ["module load cuda/12"]}, companion=True),
    ),
    "hetjob_of_several_nodes": together(
        request(TRAIN, {"nodes": 2, "gpus_per_node": 4, "cpus_per_task": 6}, SITE),
        request(LISTENER, {"gpus_per_node": 1}, companion=True),
    ),
    "site_options": request(SAMPLE, {"tasks": 2, "sbatch": {"exclude": "node14"}, "account": ""}, SITE),
}


@pytest.mark.parametrize(("own_s", "delay_s", "grace_s"), [(None, 120, 108), (900, 900, 810), (30, 30, 20), (5, 5, 10)])
def test_a_job_may_take_almost_the_whole_signal_delay_to_leave(own_s: int | None, delay_s: int, grace_s: float) -> None:
    made = request(TRAIN, {"signal_delay_s": own_s, "time_min": 720}, {"signal_delay_s": 120})
    assert made.resources.signal_delay_s == delay_s
    assert made.spec.grace_s == float(made.spec.environment["HPC_RL_GRACE_S"]) == grace_s


def rendered(name: str) -> list[str]:
    executor = SlurmExecutor(3 if name == "array_beyond_max_array_size" else 1000)
    return [script.replace(sys.executable, "/PYTHON") for script in executor.render(CASES[name])]


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_one_that_was_reviewed(name: str) -> None:
    text = "\n# ----- next sbatch -----\n".join(rendered(name))
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"review the change, then write {path.name} anew with UPDATE_GOLDEN=1"


def test_no_reviewed_script_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sh")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_the_script(name: str) -> None:
    for script in rendered(name):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))


def test_of_a_heterogeneous_job_each_component_has_its_options_and_only_the_leader_asks_for_its_requeue() -> None:
    (script,) = rendered("hetjob_of_several_nodes")
    leader, service = (options(part) for part in script.split("#SBATCH hetjob"))
    assert (leader["nodes"], leader["gpus-per-node"], service["nodes"], service["gpus-per-node"]) == (
        "2",
        "4",
        "1",
        "1",
    )
    assert (leader["signal"], service["signal"]) == ("USR2@300", "USR2@120")
    assert leader["exclude"] == "node13"
    assert service["exclude"] == "", "sbatch would hand it on"
    commands = re.findall(r"^srun .*--het-group=(\d) .*/(lewis-\S+)\.json$", script, re.MULTILINE)
    assert commands == [("1", "lewis-r02-grade.listener-a1-abc123"), ("0", "lewis-r02-train-a1-abc123")], (
        "the last command's end is the job's"
    )
    case = CASES["hetjob_of_several_nodes"]
    assert [part.spec.companion for part in (case, *case.beside)] == [False, True]


def test_an_array_is_split_into_pieces_that_slurm_takes_and_no_element_is_lost() -> None:
    arrays = [options(script).get("array", "") for script in rendered("array_beyond_max_array_size")]
    assert [array.partition("%")[0] for array in arrays] == ["0-2", "0-2", "0-0"], "7 tasks, at most 3 in an array"


def test_a_log_is_never_truncated_by_a_requeue() -> None:
    for name in CASES:
        for script in rendered(name):
            assert options(script)["open-mode"] == "append"
            assert "requeue" in options(script)


def test_an_option_of_the_stage_beats_that_of_the_site() -> None:
    found = options(rendered("site_options")[0])
    assert found["exclude"] == "node14"
    assert found["partition"] == "gpu"
    assert "account" not in found, '"" means none although the site has one'


def test_a_path_with_blanks_stays_one_word() -> None:
    plain = CASES["single"]
    spaced = replace(plain, spec=replace(plain.spec, workspace="/data/my runs/lewis"), code=Path("/data/my code"))
    script = SlurmExecutor(10).render(spaced)[0]
    assert "'/data/my runs/lewis/rounds/round_02/evaluate/attempts/lewis-r02-evaluate-a1-abc123.json'" in script
    assert "export PYTHONPATH='/data/my code'" in script


def test_what_the_set_up_says_does_not_open_the_code_to_others_nor_put_other_code_first(tmp_path: Path) -> None:
    """The script as bash runs it, with an srun that looks around, in a folder with another `hpc_rl`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    for folder, says in (("here", "sys.exit('the wrong one')"), ("code", "print(sys.argv[1]); open('made', 'w')")):
        (tmp_path / folder / "hpc_rl" / "cluster").mkdir(parents=True)
        (tmp_path / folder / "hpc_rl" / "cluster" / "entry.py").write_text(f"import sys\n{says}\n")
    made = request(EVALUATE, {"setup": ["umask 002", "export PYTHONPATH=$PWD"]})
    (script,) = SlurmExecutor(10).render(replace(made, code=tmp_path / "code"))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(made.spec.path)
    assert (tmp_path / "here" / "made").stat().st_mode & 0o777 == 0o644
