"""FSDP and fused kernels: what is asked of transformers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from pydantic import ValidationError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.training import SftTrainConfig
from hpc_rl.engines.weights import Role, Weights
from hpc_rl.training import acceleration, models
from hpc_rl.training.algorithms.grpo_base import OnPolicy
from hpc_rl.training.exporting import consolidate, export
from hpc_rl.training.ranks.distributed import World
from hpc_rl.training.ranks.leaving import Leaving
from hpc_rl.training.run import Places, TrainRun
from hpc_rl.training.task import TrainTask
from tests.training.conftest import REPOSITORY
from tests.training.test_checkpoints import claimable
from tools import tiny_chat_model

FSDP = REPOSITORY / "configs/fsdp/full_shard.json"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, as far as arguments go."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_fsdp_without_a_gpu_is_an_error_and_not_plain_data_parallel() -> None:
    with pytest.raises(ValueError, match=r"sft.fsdp is set, and there is no GPU: FSDP works on GPUs only. Set it to"):
        acceleration.arguments(SftTrainConfig(fsdp=FSDP), "sft")


def test_the_shipped_fsdp_config_is_one_that_transformers_takes(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "")  # transformers sets it
    found = acceleration.arguments(SftTrainConfig(fsdp=FSDP, gradient_checkpointing=True), "sft")
    monkeypatch.undo()
    made = TrainingArguments(output_dir="none", use_cpu=True, **found).fsdp_plugin_args
    assert made is not None
    wanted = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT", "activation_checkpointing": True}
    assert wanted.items() <= made.items() and not found["gradient_checkpointing"]


def test_what_the_config_decides_does_not_stand_in_the_file(gpu: None, tmp_path: Path) -> None:
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"activation_checkpointing": True}))
    with pytest.raises(ValueError, match=r"sets activation_checkpointing, which sft.gradient_checkpointing decides"):
        acceleration.arguments(SftTrainConfig(fsdp=file), "sft")
    file.write_text("[]")
    with pytest.raises(ValueError, match="no JSON object; shipped"):
        acceleration.arguments(SftTrainConfig(fsdp=file), "sft")


def test_fsdp_and_deepspeed_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="beside deepspeed"):
        SftTrainConfig(fsdp=FSDP, deepspeed=REPOSITORY / "configs/deepspeed/zero2_offload.json")


def test_what_is_in_the_files_decides_whether_a_checkpoint_counts_and_not_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.safetensors").touch()
    job = claimable(tmp_path)

    def fingerprint(name: str, file: Path) -> str:
        task = TrainTask("sft", SftTrainConfig(**{name: file}), "sft", Role("a", SpeakerConfig(path=str(tmp_path))), 0)
        places = Places(tmp_path / "checkpoints", tmp_path, None, "token", lambda name: tmp_path / name, None)
        start = Weights(str(tmp_path), None, "hash")
        with Leaving() as leaving:
            run = TrainRun(job, task, World(), leaving, start, places, lambda *_: None, lambda: True)
            return run.checkpoints("work").fingerprint

    for name, shipped in {"fsdp": FSDP, "deepspeed": REPOSITORY / "configs/deepspeed/zero2.json"}.items():
        moved, other = tmp_path / f"{name}.json", tmp_path / f"{name}_other.json"
        moved.write_text(shipped.read_text())
        key = {"fsdp": "state_dict_type", "deepspeed": "zero_allow_untested_optimizer"}[name]
        other.write_text(json.dumps({**json.loads(shipped.read_text()), key: "FULL_STATE_DICT"}))
        assert fingerprint(name, moved) == fingerprint(name, shipped) != fingerprint(name, other)


def test_fused_kernels_are_used_where_they_are_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.syspath_prepend(str(tmp_path))
    auto, off = SftTrainConfig(), SftTrainConfig(fused_kernels="off")
    assert not acceleration.fused_kernels(auto, gpu=True)
    assert "none (liger_kernel is not installed)" in caplog.text
    (tmp_path / "liger_kernel.py").touch()
    assert acceleration.fused_kernels(auto, gpu=True)
    assert "fused kernels: Liger's layers" in caplog.text
    assert not acceleration.fused_kernels(auto, gpu=False) and "none (no GPU)" in caplog.text
    assert not acceleration.fused_kernels(off, gpu=True) and "none (off)" in caplog.text


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A process group of this process, and a mesh of its one CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_fsdp_has_sharded_is_exported_whole(one_rank: Any, lora: bool, tmp_path: Path) -> None:
    base = tiny_chat_model.write(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    models.ban(model, [3])
    for layer in (model.get_base_model() if lora else model).model.layers:
        fully_shard(layer, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    whole = consolidate.gather(Accelerator(cpu=True), model, AutoTokenizer.from_pretrained(base))
    assert whole is not None and all(type(tensor) is torch.Tensor for tensor in whole.state.values())
    folder = export.write(whole, tmp_path / "round_01", "t", dtype="float32", export="both")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged" if lora else folder)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"


def test_a_reference_model_beside_one_of_fsdp_is_sharded_too(one_rank: Any, tmp_path: Path) -> None:
    """accelerate by itself leaves a model that is not trained where it is: on the CPU, whole."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_chat_model.write(tmp_path / "base"), dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    ours: Any = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=True, temperature=1.0,
        accelerator=SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)),
            device=torch.device("cpu"), torch_device_mesh=None,
        ),
    )  # fmt: skip
    reference = OnPolicy._prepare_reference(ours, model)
    assert all(isinstance(parameter, DTensor) for parameter in reference.parameters()) and not reference.training
    assert torch.allclose(reference(ids).logits, expected)
