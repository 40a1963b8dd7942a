"""Job bodies that were given GPUs, and see none, end before they begin."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import pytest
import torch

from hpc_rl.engines.gpus import NoGpuError
from hpc_rl.run.workspace import Workspace
from jobs import sample
from tests.jobs.listening import arguments

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that torch sees")
NewRun = Callable[..., Workspace]


@pytest.mark.parametrize(
    ("job", "stage", "round"),
    [("sample", "sample", 1), ("lewis.evaluate", "evaluate", 0), ("serve", "evaluate.listener", 0)],
)
def test_a_job_without_its_gpus_does_nothing(
    new_run: NewRun, job: str, stage: str, round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = new_run(f"stages.{stage}.gpus_per_node=1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    body = importlib.import_module(f"jobs.{job}")
    with pytest.raises(NoGpuError, match=rf"stages.{stage}.gpus_per_node is 1, but torch sees no GPU"):
        body.main(["--workspace", str(ws.root), "--round", str(round), "--stage", stage])
    folder = ws.stage_dir(round, stage)
    assert not folder.exists() or not any(folder.iterdir())


def test_without_a_scheduler_it_works_on_cpus(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ws = new_run("stages.sample.gpus_per_node=1")
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.WARNING):
        assert sample.main(arguments(ws)) == 0
    assert "working on the CPU, which is slow" in caplog.text
