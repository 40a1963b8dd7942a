"""What makes a training fit on GPUs, or run faster there: FSDP and fused kernels. Whatever is chosen is in the log."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch

from hpc_rl.config.training import TrainConfig

log = logging.getLogger(__name__)

OURS = {"activation_checkpointing": "gradient_checkpointing"}
"""Keys of an FSDP JSON that the config decides, and how."""


def arguments(options: TrainConfig, section: str) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments` for both.

    Parameters
    ----------
    options, section
        Of the training, and the section's name in the config.

    Raises
    ------
    ValueError
        With `fsdp` on a machine without GPUs, where accelerate would train data parallel without a word; and when the
        file is no JSON object, or sets what the config decides.
    """
    made: dict[str, Any] = {"use_liger_kernel": fused_kernels(options, torch.cuda.is_available())}
    config = fsdp_config(options, section)
    if config is not None:
        if not torch.cuda.is_available():
            raise ValueError(
                f"{section}.fsdp is set, and there is no GPU: FSDP works on GPUs only. Set it to null, or deepspeed"
            )
        log.info("FSDP: %s", config)
        made |= {"fsdp": True, "fsdp_config": config, "gradient_checkpointing": False}
    return made


def fused_kernels(options: TrainConfig, gpu: bool) -> bool:
    """Whether layers are Liger's. TRL computes log-probabilities without whole logits in any case."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    used = options.fused_kernels == "auto" and gpu and installed
    why = "off" if options.fused_kernels == "off" else "no GPU" if not gpu else "liger_kernel is not installed"
    log.info("fused kernels: %s", "Liger's layers" if used else f"none ({why})")
    return used


def fsdp_config(options: TrainConfig, section: str) -> dict[str, Any] | None:
    """The FSDP JSON as a dict, with what we decide; None without one.

    Raises
    ------
    ValueError
        When the file is no JSON object, or sets what the config decides.
    """
    if options.fsdp is None:
        return None
    field, path = f"{section}.fsdp", Path(options.fsdp)
    assert options.deepspeed is None, "the config has a fault otherwise"
    try:
        settings: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}: {path} is not a JSON file ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{field}: {path} is no JSON object; shipped: configs/fsdp/full_shard.json")
    for key, owner in OURS.items():
        if key in settings:
            raise ValueError(f"{field}: {path} sets {key}, which {section}.{owner} decides. Take it out of the file")
    # FSDP recomputes activations by itself, and transformers refuses to be asked for it twice
    settings["activation_checkpointing"] = options.gradient_checkpointing
    settings.setdefault("state_dict_type", "SHARDED_STATE_DICT")  # else rank 0 gathers all for each checkpoint
    made: dict[str, Any] = settings
    return made
