"""From our config to TRL's: everything that GRPOConfig and the DeepSpeed JSON are told, in one place (L15–L19)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.run.seeds import derive
from hpc_rl.training.distributed import World
from hpc_rl.training.plan import Shape
from hpc_rl.training.trl_parts import GRPOConfig


def shape_of(config: LewisConfig, world: World) -> Shape:
    """The size of an optimizer step on the ranks that there are."""
    return Shape(world.size, config.train.gradient_accumulation_steps, config.train.per_device_batch_size)


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed config; 0 without one."""
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(path: Path | None) -> dict[str, Any] | None:
    """The DeepSpeed JSON as a dict, with what exporting the weights needs.

    Raises
    ------
    ValueError
        When the file is not JSON, or is no ZeRO stage that this trainer knows.
    """
    if path is None:
        return None
    try:
        loaded: dict[str, Any] = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"train.deepspeed: {path} is not valid JSON ({error})") from error
    if zero_stage(loaded) == 3:  # else the weights could not be written as a Hugging Face folder at the end
        loaded["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if not torch.cuda.is_available():
        loaded.get("zero_optimization", {})["overlap_comm"] = False  # gloo has no streams to overlap on
    return loaded


def grpo_config(
    config: LewisConfig, deepspeed: dict[str, Any] | None, output: Path, *, round: int, live_steps: int | None = None
) -> GRPOConfig:
    """Settings of TRL's trainer. Make it before the model: with ZeRO-3 it decides how models are loaded.

    Parameters
    ----------
    output
        Where checkpoints go.
    live_steps
        `rollouts: live` only: optimizer steps.
    """
    train, sample = config.train, config.sample
    gpu = torch.cuda.is_available()
    whole_vision = config.speaker.lora is None and not config.speaker.freeze_vision
    return GRPOConfig(
        output_dir=str(output),
        seed=derive(config.run.seed, round, "trainer"),
        num_train_epochs=1,  # the plan holds all epochs
        max_steps=live_steps or -1,
        per_device_train_batch_size=train.per_device_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        num_generations=sample.samples_per_prompt,
        num_iterations=train.passes if live_steps else 1,  # so does it hold all passes
        max_completion_length=sample.max_tokens,
        temperature=sample.temperature,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler,
        warmup_steps=train.warmup_steps,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        epsilon=train.epsilon,
        beta=0.0,  # the trainer sets it later: TRL would take the round's first policy for the initial model
        loss_type=train.loss_type,
        scale_rewards=train.scale_rewards,
        reward_weights=[config.rewards.accuracy.weight, config.rewards.format.weight, config.rewards.length.weight],
        gradient_checkpointing=train.gradient_checkpointing,
        deepspeed=deepspeed,
        ddp_find_unused_parameters=whole_vision,
        use_cpu=not gpu,
        bf16=config.speaker.dtype == "bfloat16",
        fp16=config.speaker.dtype == "float16",
        save_strategy="no",  # our callback asks for checkpoints
        logging_steps=config.logging.log_every_steps,
        logging_nan_inf_filter=False,
        report_to="wandb" if config.logging.wandb.enabled else "none",
        run_name=f"{config.run.name}-round_{round:02d}",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
    )
