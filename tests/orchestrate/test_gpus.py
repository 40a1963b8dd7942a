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


def test_every_replica_counts_and_what_is_too_large_alone_is_said_once(tmp_path: Path) -> None:
    replicas = ("stages.grade.listener.tasks=3", "services.listener.placement=job")
    assert problems(tmp_path, 4, *BOTH, *replicas) == []
    assert "hold 4 GPUs" in problems(tmp_path, 3, *BOTH, *replicas)[0]
    large = ("stages.grade.listener.gpus_per_node=4", "stages.grade.listener.ranks_per_node=1")
    (said,) = problems(tmp_path, 2, *large)
    assert "grade.listener asks for 4 GPUs" in said


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
