"""Which GPUs a task has, by whatever names, and how they are shared out."""

from __future__ import annotations

import logging
import re
import socket

import pytest
import torch

from hpc_rl.config.gpu_shares import GpuShareError, share_gpus
from hpc_rl.config.schema import Config
from hpc_rl.engines.gpus import NoGpuError, check_gpus, task_gpus
from hpc_rl.engines.vllm_start import start_vllm

UUIDS = ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-1f5a2d0e-0000-4106-c12f-20bd9faed9f6")
SLICES = ("MIG-0a1b2c3d-1111-5222-9333-444455556666", "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0")


@pytest.mark.parametrize(
    ("variable", "gpus"),
    [
        ("0,1,2,3", ("0", "1", "2", "3")),
        ("5, 2", ("5", "2")),
        (",".join(UUIDS), UUIDS),
        (",".join(SLICES), SLICES),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("NoDevFiles", ()),
    ],
)
def test_gpus_are_those_that_the_task_was_given(variable: str, gpus: tuple[str, ...]) -> None:
    assert task_gpus({"CUDA_VISIBLE_DEVICES": variable}) == gpus


def test_gpus_are_shared_equally_neighbours_together() -> None:
    assert share_gpus(["4", "5", "6", "7"], 4) == [("4",), ("5",), ("6",), ("7",)]
    assert share_gpus(["4", "5", "6", "7"], 2) == [("4", "5"), ("6", "7")]
    assert share_gpus(["4", "5", "6", "7"], 1) == [("4", "5", "6", "7")]
    assert share_gpus(["4", "5", "6", "7"], 3, per_engine=1) == [("4",), ("5",), ("6",)]
    assert share_gpus(UUIDS, 2) == [(UUIDS[0],), (UUIDS[1],)]
    assert share_gpus(SLICES, 2) == [(SLICES[0],), (SLICES[1],)]


def test_gpu_ids_are_places_among_the_tasks_own() -> None:
    assert share_gpus(["4", "5", "6", "7"], 2, gpu_ids=(3, 1)) == [("7",), ("5",)]
    assert share_gpus(["4", "5", "6", "7"], 1, gpu_ids=(0, 2)) == [("4", "6")]
    assert share_gpus(UUIDS, 1, gpu_ids=(1,)) == [(UUIDS[1],)]


def test_without_gpus_each_engine_has_none() -> None:
    assert share_gpus([], 3) == [(), (), ()]
    assert share_gpus([], 2, per_engine=2) == [(), ()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": ["0", "1", "2"], "engines": 2}, "2 engines cannot share 3 GPUs equally"),
        (
            {"gpus": ["0", "1"], "engines": 2, "per_engine": 2},
            "data_parallel_size: 2 engines of 2 GPUs each, but the task has 2; .* gpus_per_node to 4",
        ),
        (
            {"gpus": ["0"], "engines": 1, "per_engine": 4},
            "tensor_parallel_size: one engine of 4 GPUs, but the task has 1",
        ),
        (
            {"gpus": ["0", "1"], "engines": 1, "gpu_ids": (0, 2)},
            r"gpu_ids: \[2\] of \[0, 2\].* the task has 2 GPUs \(0, 1\)",
        ),
        ({"gpus": [], "engines": 1, "gpu_ids": (0,)}, r"the task has 0 GPUs \(none\)"),
        ({"gpus": SLICES, "engines": 1}, r"slices of a GPU \(MIG\) cannot work as one"),
    ],
)
def test_what_cannot_be_shared_is_said(given: dict[str, object], message: str) -> None:
    with pytest.raises(GpuShareError, match=message):
        share_gpus(**given)  # type: ignore[arg-type]


def config_with(gpus: int, **cluster: bool) -> Config:
    stages = {"sample": {"gpus_per_node": gpus}}
    return Config.model_validate({"run": {"name": "a", "workspace": "/w"}, "cluster": cluster, "stages": stages})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that torch sees")
@pytest.mark.parametrize("given", [{"SLURM_JOB_ID": "7"}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_a_task_that_was_given_gpus_and_sees_none_does_not_begin(given: dict[str, str]) -> None:
    with pytest.raises(NoGpuError) as caught:
        check_gpus(config_with(2), "sample", given)
    said = str(caught.value)
    visible = given.get("CUDA_VISIBLE_DEVICES", "not set")
    assert said.startswith(f"stages.sample.gpus_per_node is 2, but torch sees no GPU on {socket.gethostname()} ")
    assert f"(CUDA_VISIBLE_DEVICES: {visible}; torch " in said
    assert f"built for CUDA: {torch.version.cuda or 'no'})" in said
    assert re.search(r"To work on CPUs, set stages.sample.gpus_per_node to 0$", said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that torch sees")
@pytest.mark.parametrize(
    ("config", "environ", "warned"),
    [
        (config_with(0), {"SLURM_JOB_ID": "7"}, False),
        (config_with(1), {}, True),
        (config_with(1), {"CUDA_VISIBLE_DEVICES": ""}, True),
        (config_with(1), {"CUDA_VISIBLE_DEVICES": "-1"}, True),
        (config_with(1, allow_no_gpu=True), {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"}, True),
    ],
)
def test_where_nobody_deals_out_gpus_work_on_cpus_goes_on_and_is_said(
    config: Config, environ: dict[str, str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_gpus(config, "sample", environ)
    assert ("working on the CPU, which is slow" in caplog.text) == warned


def test_an_engine_that_is_larger_than_what_the_process_sees_says_so_in_the_words_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a machine with one GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(
        ValueError, match=r"sample.tensor_parallel_size is 4, .* 1 GPU \(CUDA_VISIBLE_DEVICES=3\): .* null"
    ):
        start_vllm("model", dtype="float32", max_model_len=None, gpu_memory_utilization=0.8, tensor_parallel_size=4)
