"""GPUs of one machine: a stage and the services that it asks hold theirs at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl import launch, recipes
from hpc_rl.orchestrate.gpus import gpu_problems, gpus_at_once
from hpc_rl.run.code import source_root

TINY = source_root() / "configs/tiny/lewis.yaml"
BOTH = ("stages.grade.gpus_per_node=1", "stages.grade.listener.gpus_per_node=1")


def problems(tmp_path: Path, have: int, *settings: str) -> list[str]:
    """What too few GPUs are said to be too few for."""
    config = configs.load(TINY, settings, {}, tmp_path / "w")
    return [str(one) for one in gpu_problems(config, recipes.graph_of(config), have)]


@pytest.mark.parametrize("placement", ["job", "hetjob"])
def test_a_stage_and_its_service_need_their_gpus_at_the_same_time(tmp_path: Path, placement: str) -> None:
    placed = f"services.listener.placement={placement}"
    config = configs.load(TINY, [*BOTH, placed], {}, tmp_path / "w")
    assert gpus_at_once(config, recipes.graph_of(config))["grade", "grade.listener"] == 2
    assert problems(tmp_path, 2, *BOTH, placed) == [] == problems(tmp_path, 1, BOTH[1], placed)
    (said,) = problems(tmp_path, 1, *BOTH, placed)
    assert "grade and grade.listener hold 2 GPUs at the same time, and this machine has 1" in said
    assert "services.listener.client.url" in said
    assert problems(tmp_path, 1, *BOTH, placed, "stages.grade.listener.gpus_per_node=0") == []  # the way out


def test_every_replica_counts_but_a_stage_without_gpus_starts_beside_the_first(tmp_path: Path) -> None:
    replicas = "stages.grade.listener.tasks=3"
    assert problems(tmp_path, 4, *BOTH, replicas) == []
    assert "hold 4 GPUs" in problems(tmp_path, 3, *BOTH, replicas)[0]
    assert problems(tmp_path, 2, BOTH[1], replicas) == []


@pytest.mark.parametrize("large", ["train", "train.listener"])
def test_what_is_too_large_alone_is_said_once_with_a_way_out_that_works(tmp_path: Path, large: str) -> None:
    live = ["train.rollouts=live", "stages.train.gpus_per_node=1", "stages.train.listener.gpus_per_node=1"]
    live += [f"stages.{large}.gpus_per_node=4", f"stages.{large}.ranks_per_node=1"]
    (said,) = problems(tmp_path, 3, *live)
    assert f"{large} asks for 4 GPUs" in said
    (way_out,) = (line for line in said.splitlines() if "way out" in line)
    live += way_out.partition(":")[2].replace("--set", "").split()
    (said,) = problems(tmp_path, 3, *live)
    assert "train and train.listener hold 4 GPUs" in said
    assert problems(tmp_path, 3, *live, "stages.train.listener.gpus_per_node=0") == []


def test_a_machine_without_gpus_deals_out_none(tmp_path: Path) -> None:
    assert problems(tmp_path, 0, *BOTH) == []


def test_launch_says_so_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    settings = [part for one in BOTH for part in ("--set", one)]
    arguments = [str(TINY), "--executor", "local", "--workspace", str(tmp_path / "w"), *settings]
    assert launch.main(arguments) == 2
    assert "grade and grade.listener hold 2 GPUs" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_run_that_has_begun_is_not_refused_for_what_it_may_have_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = configs.load(TINY, BOTH, {}, tmp_path / "w")
    assert launch.too_few_gpus(config)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/training_config.json").touch()
    assert launch.too_few_gpus(config) == []
