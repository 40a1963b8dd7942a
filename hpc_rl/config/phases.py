"""How a round samples, trains and evaluates: the numbers of GRPO and of the engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import (
    Fault,
    FilePath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Engine = Literal["vllm", "transformers"]


class SampleConfig(Section):
    """Sampling completions (B prompts, G samples of each)."""

    engine: Engine = "vllm"
    """What generates. There is no silent change from one to the other."""
    prompts_per_round: PositiveInt = 128
    """Prompts (B) of a round; rounds go through the training rows epoch by epoch in a seeded order."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Completions (G) of each prompt: the group that the advantage is relative to (L15)."""
    shard_size: PositiveInt = 16
    """Prompts of one shard: what a lost task costs. Use more shards than array tasks."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must be 1: truncated sampling biases the importance ratio of training."""
    max_tokens: PositiveInt = 512
    """Longest completion, in tokens."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together, in tokens. null = the model's own limit."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of a GPU's memory that the engine takes."""
    batch_invariant: bool = True
    """The engine's mode in which a sample does not depend on what else is in the batch, where it has one."""
    merge_adapter: bool = False
    """Merge the LoRA adapter into the weights before sampling: about twice as fast, needs room for a merged copy."""

    def faults(self) -> Iterator[Fault]:
        """Truncated sampling; lengths without room for a prompt."""
        if self.top_p != 1.0:
            yield Fault(("top_p",), f"{self.top_p} cuts the distribution, which biases the importance ratio", "1.0")
        if self.max_model_len is not None and self.max_model_len <= self.max_tokens:
            what = f"{self.max_model_len} leaves no room for a prompt beside max_tokens = {self.max_tokens}"
            yield Fault(("max_model_len",), what, "more than max_tokens, or null")


class TrainConfig(Section):
    """GRPO (L15, L18). Learning rate and batch stand here only; the DeepSpeed JSON says "auto"."""

    rollouts: Literal["round", "live"] = "round"
    """round: train on the round's graded samples. live: the trainer generates and calls the listener by itself."""
    learning_rate: PositiveFloat = 5e-7
    """Peak learning rate of AdamW (L18)."""
    per_device_batch_size: PositiveInt = 1
    """Completions in one forward pass of one rank."""
    gradient_accumulation_steps: PositiveInt = 16
    """Forward passes per optimizer step. L17: 8 for 2B, 16 for 7B, 32 for 14B models."""
    passes: PositiveInt = 1
    """Optimizer passes over the same rollouts before the next (num_iterations, μ in the GRPO paper)."""
    epochs: PositiveInt = 1
    """Epochs over the round's samples."""
    epsilon: PositiveFloat = 0.2
    """Clip range of the importance ratio."""
    beta: NonNegativeFloat = 0.0
    """Weight of the k3 KL estimate to the initial model (L15); 0 needs no reference model."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How token losses are averaged."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the advantage is divided by: the deviation of the group (L15), of the batch, or nothing."""
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
    live_max_steps: PositiveInt | None = None
    """Optimizer steps of a round with `rollouts: live`. null = one pass over the round's prompts."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints of a training job that are kept; removed once its final weights are verified (L23)."""


class EvaluateConfig(Section):
    """The game on images and concepts that training never saw (L21)."""

    engine: Engine | None = None
    """What generates. null = `sample.engine`."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy."""
    batch_size: PositiveInt = 64
    """Games handed to the engine and to the listener at once."""
    sample_texts_to_log: NonNegativeInt = 8
    """Games whose image and description go to TensorBoard each round."""
