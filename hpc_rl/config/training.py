"""How models are trained: what all algorithms have in common, and a section of its own for each.

Learning rate and batch stand here only; a DeepSpeed JSON says "auto" (L18).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class TrainConfig(Section):
    """What every algorithm is told. What a batch is made of differs: completions, pairs, texts."""

    learning_rate: PositiveFloat = 5e-7
    """Peak learning rate of AdamW (L18)."""
    per_device_batch_size: PositiveInt = 1
    """Completions (or pairs, texts) in one forward pass of one rank. Halved after running out of memory, with
    `gradient_accumulation_steps` doubled, so that a step stays the same."""
    gradient_accumulation_steps: PositiveInt = 16
    """Forward passes per optimizer step. L17: 8 for 2B, 16 for 7B, 32 for 14B models."""
    epochs: PositiveInt = 1
    """Epochs over the data of the round."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps in which the learning rate rises from 0 (L18)."""
    lr_scheduler: Literal["constant_with_warmup", "constant", "linear", "cosine"] = "constant_with_warmup"
    """Course of the learning rate after the warm-up."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's averages of gradient and squared gradient (L18)."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay (L18)."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = True
    """Recompute activations instead of storing them (L19)."""
    deepspeed: FilePath | None = None
    """DeepSpeed JSON, `configs/deepspeed/zero3_offload.json` (L18). null = plain data parallel."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """torch.distributed backend. auto: nccl on GPUs, gloo on CPUs."""
    save_steps: PositiveInt = 50
    """Optimizer steps between two checkpoints from which a killed training job goes on."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints of a training job that are kept; removed once its final weights are verified (L23)."""


class GrpoTrainConfig(TrainConfig):
    """GRPO (L15, L18; Shao et al. 2024, arXiv:2402.03300)."""

    rollouts: Literal["round", "live"] = "round"
    """round: train on the round's graded samples. live: the trainer generates and asks for rewards by itself."""
    passes: PositiveInt = 1
    """Optimizer passes over the same rollouts before the next (num_iterations, μ in the GRPO paper)."""
    epsilon: PositiveFloat = 0.2
    """Clip range of the importance ratio."""
    beta: NonNegativeFloat = 0.0
    """Weight of the k3 KL estimate to the initial model (L15); 0 needs no reference model."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How token losses are averaged."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the advantage is divided by: the deviation of the group (L15), of the batch, or nothing."""
    live_max_steps: PositiveInt | None = None
    """Optimizer steps of a round with `rollouts: live`. null = one pass over the round's prompts."""
