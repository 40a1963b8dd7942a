"""From our config to TRL's and transformers': what all trainers are told, in one place (L15–L19)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_rl.config.modeling import VisionModelConfig
from hpc_rl.run.seeds import derive
from hpc_rl.training import acceleration, models
from hpc_rl.training.task import TrainTask

if TYPE_CHECKING:
    from hpc_rl.training.run import TrainRun


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed config; 0 without one."""
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(task: TrainTask) -> dict[str, Any] | None:
    """The DeepSpeed JSON as a dict, with what exporting the weights needs.

    Raises
    ------
    ValueError
        When the file is not JSON.
    """
    path = task.settings.deepspeed
    if path is None:
        return None
    try:
        loaded: dict[str, Any] = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{task.section}.deepspeed: {path} is not valid JSON ({error})") from error
    if zero_stage(loaded) == 3:  # else the weights could not be written as a Hugging Face folder at the end
        loaded["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if not torch.cuda.is_available():
        loaded.get("zero_optimization", {})["overlap_comm"] = False  # gloo has no streams to overlap on
    return loaded


def padding(tokenizer: Any) -> int:
    """The token that fills rows up, where none is looked at: a tokenizer without one for it ends texts with it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def common(run: TrainRun, output: Path) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`, whatever the algorithm; each adds its own.

    Make them before the model: with ZeRO-3 they decide how models are loaded.

    Parameters
    ----------
    output
        Where checkpoints go.
    """
    train, model, config = run.task.settings, run.task.role.model, run.job.config
    gpu = torch.cuda.is_available()
    whole_vision = isinstance(model, VisionModelConfig) and model.lora is None and not models.freezes_vision(model)
    return {
        "output_dir": str(output),
        "seed": derive(config.run.seed, run.round, "trainer"),
        "num_train_epochs": 1,  # the plan holds all epochs
        "per_device_train_batch_size": train.per_device_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_steps,
        "adam_beta1": train.adam_betas[0],
        "adam_beta2": train.adam_betas[1],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        "gradient_checkpointing": train.gradient_checkpointing,
        "deepspeed": run.deepspeed,
        "ddp_find_unused_parameters": whole_vision,
        "use_cpu": not gpu,
        "bf16": model.dtype == "bfloat16",
        "fp16": model.dtype == "float16",
        "save_strategy": "no",  # our callback asks for checkpoints
        "logging_steps": config.logging.log_every_steps,
        "logging_first_step": True,  # by itself: the manifest says how far sampler and trainer are apart in it
        "logging_nan_inf_filter": False,
        "report_to": "wandb" if config.logging.wandb.enabled else "none",
        "run_name": f"{config.run.name}-round_{run.round:02d}",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        **acceleration.arguments(train, run.task.section),
    }
