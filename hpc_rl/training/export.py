"""A round's final weights: gathered from all ranks, written as a Hugging Face folder, loaded once before they count."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hpc_rl.run import atomic
from hpc_rl.training.checkpoints import sync_files
from hpc_rl.training.models import ban_parameter

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
State = dict[str, torch.Tensor]


class BadExport(RuntimeError):
    """Weights that were written but cannot be used; the message says why. They get no manifest."""


def gather(trainer: Any) -> State | None:
    """The trained weights as one state dict on rank 0; None on the others. All ranks must call it.

    With LoRA they are the adapter's. Under ZeRO-3 each is brought together from the ranks that hold its parts.
    """
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter_only = is_peft_model(model)
    if trainer.is_deepspeed_enabled and trainer.deepspeed.zero_optimization_partition_weights():
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter_only)
    else:
        state = model.state_dict()
    if not trainer.accelerator.is_main_process:
        return None
    state.pop(ban_parameter(model), None)
    if adapter_only:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=state)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def write(model: Any, processor: Any, state: State, target: Path, token: str, dtype: str) -> Path:
    """Write and verify the folder under a temporary name; returns it. `put_in_place` gives it its own.

    Parameters
    ----------
    model, state
        The trained model, and its weights from `gather`.
    processor
        Written beside a full model; an adapter uses its base's.
    target
        Where the folder will be.
    token
        Unique to this claim of the stage.
    dtype
        Number type of a full model on disk: the one that the next round samples with. An adapter keeps its own.

    Raises
    ------
    BadExport
        When it cannot be loaded in the documented way, or what is loaded is not what was trained.
    """
    from accelerate.utils import is_peft_model

    folder = _temporary(target, token)
    folder.mkdir(parents=True)
    not_finite = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise BadExport(f"training diverged: {len(not_finite)} tensors are not finite, {not_finite[0]} among them")
    if is_peft_model(model):
        _write_adapter(model, state, folder)
        verify_adapter(folder, state)
    else:
        number_type = getattr(torch, dtype)
        model.config.dtype = number_type
        state = {name: t.to(number_type) if t.is_floating_point() else t for name, t in state.items()}
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
        verify_full(folder, state)
    sync_files(folder)
    return folder


def _write_adapter(model: Any, state: State, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / ADAPTER, metadata={"format": "pt"})
    config = model.peft_config["default"]
    trained_before, config.inference_mode = config.inference_mode, True  # as PEFT's own save_pretrained does
    config.save_pretrained(folder)
    config.inference_mode = trained_before


def put_in_place(folder: Path, target: Path, token: str, still_ours: Callable[[], bool]) -> bool:
    """Give a verified folder its own name; False, with nothing changed, when the work is no longer ours.

    Parameters
    ----------
    folder, target, token
        What `write` returned, and what it was called with.
    still_ours
        Asked right before: whether this claim holds and nobody has committed the stage. Then a folder that has the
        name already is a former attempt's, which ended before its manifest.
    """
    if not still_ours():
        return False
    if target.exists():
        target.rename(_replaced(target, token))
    folder.rename(target)
    atomic.fsync_folder(target.parent)
    return True


def remove_temporary(target: Path, token: str) -> None:
    """Remove what this claim, and no other, has left beside `target`."""
    for folder in (_temporary(target, token), _replaced(target, token)):
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path, token: str) -> Path:
    return target.with_name(f".tmp-{target.name}-{token}")


def _replaced(target: Path, token: str) -> Path:
    return target.with_name(f".old-{target.name}-{token}")


def verify_adapter(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Load an adapter as PEFT's documentation says, on its base, and compare.

    Raises
    ------
    BadExport
        When it does not load, or what is loaded is not `state`.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForImageTextToText

    _forget_deepspeed()
    config = PeftConfig.from_pretrained(str(folder))
    base = AutoModelForImageTextToText.from_pretrained(
        config.base_model_name_or_path, dtype="auto", local_files_only=True
    )
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, str(folder)))
    _compare(loaded, state, folder)


def verify_full(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Load a full model as transformers' documentation says, and compare.

    Raises
    ------
    BadExport
        When it does not load, or what is loaded is not `state`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _forget_deepspeed()
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise BadExport(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:5]}")
    AutoProcessor.from_pretrained(folder, local_files_only=True)
    _compare(model.state_dict(), state, folder)


def _compare(loaded: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    if loaded.keys() != trained.keys():
        differ = sorted(loaded.keys() ^ trained.keys())
        raise BadExport(f"{folder} holds other tensors than were trained: {', '.join(differ[:5])}")
    for name, tensor in trained.items():
        if not torch.equal(loaded[name].to(tensor.dtype), tensor):
            raise BadExport(f"{folder}: {name} is not what was trained")


def _forget_deepspeed() -> None:
    """Rank 0 alone loads the weights; with ZeRO-3 still set, transformers would wait for the others to load with it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
