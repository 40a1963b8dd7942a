"""How models are trained: what all algorithms have in common, and a section of its own for each.

Learning rate and batch stand here only; a DeepSpeed JSON says "auto" (L18).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import Fault, FilePath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

Reference = Literal["pass", "stage", "live"]
"""Where log-probabilities under the reference model come from. pass: it goes once over the data before training. stage:
a stage of the recipe has done so. live: it is in memory beside the trained model and asked with each batch."""


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
    fsdp: FilePath | None = None
    """FSDP JSON, `configs/fsdp/full_shard.json`, in place of DeepSpeed; on GPUs only. null = none."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """torch.distributed backend. auto: nccl on GPUs, gloo on CPUs."""
    preflight_s: PositiveFloat = 60
    """How long the ranks wait for each other to come, and then again until all have talked with each other. Seconds;
    the job leaves afterwards and names the node at fault."""
    save_steps: PositiveInt = 50
    """Optimizer steps between two checkpoints from which a killed training job goes on."""
    save_minutes: PositiveFloat = 10
    """Minutes after which a checkpoint is made although `save_steps` asks for none: what a kill costs at most. Longer
    where saving is slow, so that it takes no more than 5 % of the time. One is also made when the job is told to leave,
    and before its time limit when another step would not fit."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints of a training job that are kept; removed once its final weights are verified (L23)."""
    export: Literal["adapter", "merged", "both"] = "adapter"
    """What a round leaves of LoRA. adapter: a PEFT folder, with which the next round goes on. merged: a whole model,
    which the next round puts a new adapter on; a reward model is served so. both: the adapter, and the whole model in
    `merged` beside it. Without `lora` it is the whole model."""
    fused_kernels: Literal["auto", "off"] = "auto"
    """Liger's fused layers. auto: where liger_kernel is installed, on GPUs; the log says which."""
    log_completions: NonNegativeInt = 4
    """Texts of the step's first batch that go to TensorBoard with each logged step; 0 = none."""

    def faults(self) -> Iterator[Fault]:
        """Two that would share the model out."""
        if self.fsdp is not None and self.deepspeed is not None:
            yield Fault(("fsdp",), f"{self.fsdp}, beside deepspeed, which shards the model too", "one of the two")


class DataTrainConfig(TrainConfig):
    """What algorithms have in common that train on texts, pairs or solutions from elsewhere."""

    max_length: PositiveInt | None = None
    """Tokens of the longest text, prompt included. null = whatever there is."""
    too_long: Literal["error", "drop"] = "error"
    """What a longer text does: stop, with its name, or be left out and counted. Nothing is cut off."""


class OnPolicyTrainConfig(TrainConfig):
    """What GRPO and RLOO have in common. A batch is made of completions."""

    rollouts: Literal["round", "live"] = "round"
    """round: train on the round's graded samples. live: the trainer generates and asks for rewards by itself."""
    passes: PositiveInt = 1
    """Optimizer passes over the same rollouts before the next (num_iterations, μ in the GRPO paper)."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Importance ratios count between 1 − ε and 1 + ε."""
    epsilon_high: PositiveFloat | None = None
    """The same for the upper end (DAPO, arXiv:2503.14476: 0.28). null = `epsilon`."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the initial model (L15); 0 needs no reference model."""
    reference: Reference = "pass"
    """Where the initial model's log-probabilities come from, with `rollouts: round`; otherwise it is always live."""
    drop_equal_groups: bool = True
    """Leave out groups whose rewards are all equal: their advantages are 0. With `beta` they would still count for the
    divergence. The number is reported either way."""
    live_max_steps: PositiveInt | None = None
    """Optimizer steps of a round with `rollouts: live`. null = one pass over the round's prompts."""

    @property
    def reference_stage(self) -> bool:
        """Whether a stage of its own scores the samples under the initial model."""
        return self.rollouts == "round" and self.beta > 0 and self.reference == "stage"

    def faults(self) -> Iterator[Fault]:
        """What has no meaning for samples that the trainer draws by itself."""
        yield from super().faults()
        if self.rollouts == "live" and self.reference == "stage":
            yield Fault(("reference",), "stage, but samples that do not exist yet cannot be scored", "pass or live")


class GrpoTrainConfig(OnPolicyTrainConfig):
    """GRPO (L15, L18; Shao et al. 2024, arXiv:2402.03300)."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How token losses are averaged."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the advantage is divided by: the deviation of the group (L15), of the batch, or nothing."""
    correction: Literal["clip", "truncate", "mask"] = "clip"
    """What makes up for the difference between the engine that sampled and the one that trains. clip: the sampler's
    log-probabilities are the old policy's, so the clip range holds for it too. truncate: the old policy is scored anew,
    and each token weighs min(old / sampled, cap). mask: a completion beyond the cap, as a whole, does not count."""
    correction_cap: PositiveFloat = 3.0
    """The cap of `correction`."""

    def faults(self) -> Iterator[Fault]:
        """The same engine samples and trains."""
        yield from super().faults()
        if self.rollouts == "live" and self.correction != "clip":
            yield Fault(("correction",), f"{self.correction}, but with rollouts: live one engine does both", "clip")


class RlooTrainConfig(OnPolicyTrainConfig):
    """RLOO, REINFORCE with a leave-one-out baseline (S10; Ahmadian et al. 2024, arXiv:2402.14740)."""

    reward_clip: PositiveFloat | None = None
    """Rewards count between minus this and this. null = as they are."""
    normalize_advantages: bool = False
    """Divide advantages by their deviation, after taking their mean away: of the round, or of a live step's samples."""

    def faults(self) -> Iterator[Fault]:
        """The divergence is a part of the reward, so it must be known before the first step."""
        yield from super().faults()
        if self.rollouts == "round" and self.beta and self.reference == "live":
            yield Fault(("reference",), "live, but beta is a part of the reward, which is known first", "pass or stage")


SolutionLoss = Literal["pairs", "selected", "bce"]


class SftTrainConfig(DataTrainConfig):
    """Supervised fine-tuning on completions. A batch is made of texts."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW."""
    packing: bool = False
    """Put several texts into one row of up to `max_length` tokens, in which none sees another. A batch is then made of
    such rows. Language models without pictures only."""

    def faults(self) -> Iterator[Fault]:
        """Rows of no length."""
        yield from super().faults()
        if self.packing and self.max_length is None:
            yield Fault(("max_length",), "null, and packing fills rows of that many tokens", "a number of tokens")


class WeightedSftTrainConfig(SftTrainConfig):
    """Supervised fine-tuning in which each text has a weight (S17). A batch is made of texts."""


class DpoTrainConfig(DataTrainConfig):
    """DPO (S5, S6; Rafailov et al. 2023, arXiv:2305.18290). A batch is made of pairs."""

    beta: PositiveFloat = 0.1
    """β: how far the policy may go from the reference, the model at the start of the round (S6); more is nearer."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the chosen completions' mean negative log-likelihood per token, added to the loss (RPO,
    arXiv:2404.19733)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair is the wrong way round; above 0 the loss is that of robust DPO (arXiv:2403.00409)."""
    reference: Reference = "pass"
    """Where the reference's log-probabilities come from."""

    @property
    def reference_stage(self) -> bool:
        """Whether a stage of its own scores the pairs under the reference."""
        return self.reference == "stage"


class RewardTrainConfig(DataTrainConfig):
    """Reward models and verifiers (V9, V10, T9, A2). A batch is made of questions, each with all of its solutions."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW (T9)."""
    loss: SolutionLoss = "pairs"
    """pairs: each right solution of a question against each wrong one (V10, A4). selected: the right one of the lowest
    score against the wrong one of the highest, and one pair at random (A4). bce: each solution by itself (V10, T9)."""
    penalty: NonNegativeFloat = 0.0
    """Weight λ of the mean squared score, which keeps scores near 0 (V10)."""
    system_prompt: str | None = None
    """System message before each question of data that are texts; the same as the service's. null = none."""
    export: Literal["adapter", "merged", "both"] = "merged"
    """What a round leaves of LoRA, see above; a reward model is served as a whole."""


class SecondTrainConfig(Section):
    """The reward model of `JointTrainConfig`; what is not here it shares with the policy."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of its AdamW (T9)."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps in which its learning rate rises from 0."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Its AdamW's averages of gradient and squared gradient."""
    weight_decay: NonNegativeFloat = 0.1
    """Its AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Its gradients are scaled down to this norm."""
    loss: SolutionLoss = "pairs"
    """As of `RewardTrainConfig`."""
    penalty: NonNegativeFloat = 0.0
    """Weight of the mean squared score."""
    system_prompt: str | None = None
    """System message before each question of data that are texts; the same as the service's. null = none."""
    max_length: PositiveInt | None = None
    """Tokens of the longest question with a solution. null = whatever there is."""
    too_long: Literal["error", "drop"] = "error"
    """What a longer one does: stop, with its name, or be left out and counted. Nothing is cut off."""
    export: Literal["adapter", "merged", "both"] = "merged"
    """What a round leaves of its LoRA; a reward model is served as a whole."""


class JointTrainConfig(GrpoTrainConfig):
    """A policy, by GRPO, and a reward model on the same round's solutions, in one job (A4, A5)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The policy's reward is α · correctness + (1 − α) · the reward model's score, normalised within the group (A5)."""
    reward_model_weight: PositiveFloat = 1.0
    """λ of L = L_policy + λ · L_RM (A4). Each model has an optimizer of its own, and AdamW takes the same step along
    any multiple of a gradient: λ matters only where gradients are scaled down to `max_grad_norm`."""
    reward_model: SecondTrainConfig = SecondTrainConfig.model_construct()
    """How the reward model is trained."""

    def faults(self) -> Iterator[Fault]:
        """Solutions that nobody has labelled; FSDP, which knows one model."""
        yield from super().faults()
        if self.fsdp is not None:
            yield Fault(("fsdp",), f"{self.fsdp}, but two models at once are not trained with it", "null, or deepspeed")
        if self.rollouts == "live":
            yield Fault(("rollouts",), "live, but the reward model learns from graded solutions", "round")
