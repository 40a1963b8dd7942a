"""GRPO on stored rollouts, through TRL's trainer (Shao et al. 2024, arXiv:2402.03300; TRL 1.16).

TRL samples, grades and trains in one process. Here the samples were drawn and graded by other jobs, so of TRL only the
second half is used: the clipped loss, its normalisation over ranks and accumulated batches, optimizers, DeepSpeed.
`StoredRollouts` puts the plan's batches where TRL would generate, and takes the log-probabilities that the samples were
drawn with for the old policy's. So the importance ratio corrects for everything between sampling and now: updates of
this round, and differences between engines. In the first step it is 1 if tokens, pictures and ranks line up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from hpc_rl.training.batches import Batches, Tensors
from hpc_rl.training.plan import Plan, Step
from hpc_rl.training.rollouts import PARTS
from hpc_rl.training.trl_parts import GRPOConfig, GRPOTrainer, add_fused_lm_head, prepare_deepspeed


@dataclass(frozen=True)
class FirstStep:
    """What one rank saw in the first optimizer step it did: are these the rollouts of this policy?

    Attributes
    ----------
    rank, step
        Who, and which step (not 0 where a checkpoint was continued).
    tokens
        Sampled tokens of its batches.
    logprob_difference_mean, logprob_difference_max
        |log π now − log π when sampled| per token.
    ratio_min, ratio_max
        Importance ratios.
    clipped
        Share of tokens whose ratio is outside of 1 ± ε.
    """

    rank: int
    step: int
    tokens: int
    logprob_difference_mean: float
    logprob_difference_max: float
    ratio_min: float
    ratio_max: float
    clipped: float


class Grpo(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer with a KL term to the run's initial model, and checkpoints that are sealed when they are whole.

    Parameters
    ----------
    beta
        Weight of the KL term.
    initial_model
        Loads the model that KL is measured to; not called where there is no KL, nor with LoRA, where it is the policy
        without its adapter.
    seal
        Called on all ranks after all have written their part of a checkpoint, with its folder.
    """

    def __init__(
        self,
        *,
        args: GRPOConfig,
        model: Any,
        processor: Any,
        beta: float,
        initial_model: Callable[[], Any],
        seal: Callable[[Path], None],
        callbacks: list[TrainerCallback],
        **others: Any,
    ) -> None:
        super().__init__(model=model, args=args, processing_class=processor, callbacks=callbacks, **others)
        self.remove_callback(PrinterCallback)
        self._seal = seal
        if beta:
            self.beta = beta
            if not is_peft_model(self.model):
                self.ref_model = self._prepare_reference(initial_model())

    def _prepare_reference(self, model: Any) -> Any:
        add_fused_lm_head(model, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # TRL's own writes a model card first, for the hub
        self._seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


class StoredRollouts(Grpo):
    """GRPO on exactly the samples of a plan.

    Parameters
    ----------
    plan
        What to train on, the same on all ranks.
    batches
        This rank's part of it.
    """

    def __init__(self, *, plan: Plan, batches: Batches, **others: Any) -> None:
        super().__init__(
            reward_funcs=[named(part) for part in PARTS],
            train_dataset=Dataset.from_dict({"prompt": [""] * len(batches)}),  # TRL wants one; `loader` is what is read
            **others,
        )
        self._plan, self._batches = plan, batches
        self._logprobs: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self.first_step: FirstStep | None = None

    def get_train_dataloader(self) -> DataLoader[Tensors]:
        """This rank's batches, in order."""
        return self._batches.loader()

    def _prepare_inputs(self, batch: Tensors) -> Tensors:
        """Tensors to the device. Only pixels take the model's number type: log-probabilities need all of float32."""
        device = self.accelerator.device
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        if self.is_deepspeed_enabled:
            moved["pixel_values"] = moved["pixel_values"].to(self.args.hf_deepspeed_config.dtype())
        if self.beta:
            moved["ref_per_token_logps"] = self._reference_logprobs(moved)
        return moved

    @torch.no_grad()
    def _reference_logprobs(self, batch: Tensors) -> torch.Tensor:
        """(B, T) log-probabilities under the initial model."""
        if self.ref_model is not None:
            model: Any = self.ref_model
            adapter: AbstractContextManager[Any] = nullcontext()
        else:
            model = self.model_wrapped
            adapter = self.accelerator.unwrap_model(self.model).disable_adapter()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with adapter:
            logprobs: torch.Tensor = self._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].size(1), **{name: batch[name] for name in names}
            )[0]
        return logprobs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logprobs = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        assert self._logprobs is not None
        self._compare(self._logprobs, inputs["old_per_token_logps"], inputs["completion_mask"].bool())
        return loss

    def _compare(self, now: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> None:
        """Record how far the policy is from the one that sampled, over the tokens of all ranks' batches."""
        difference = (now - sampled)[mask].float()
        if self.first_step is None:
            self._first.append(difference)
        ratio = difference.exp()
        nothing = difference.new_zeros(1)
        ours = torch.stack([
            difference.abs().sum(), ratio.sum(), difference.new_tensor(float(difference.numel())),
            torch.cat([difference.abs(), nothing]).max(), torch.cat([ratio, nothing + 1]).max(),
            torch.cat([ratio, nothing + 1]).min(),
        ])  # fmt: skip
        every = self.accelerator.gather(ours[None]).float().cpu()
        tokens = float(every[:, 2].sum())
        if tokens:
            self._record("sampling/logprob_difference_mean", float(every[:, 0].sum()) / tokens)
            self._record("ratio/mean", float(every[:, 1].sum()) / tokens)
        self._record("sampling/logprob_difference_max", float(every[:, 3].max()))
        self._record("ratio/max", float(every[:, 4].max()))
        self._record("ratio/min", float(every[:, 5].min()))

    def training_step(self, model: Any, inputs: Tensors, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; with the last one of an optimizer step, its metrics."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._describe(self._plan[self.state.global_step])
            if self.first_step is None:
                self.first_step = self._summary(torch.cat(self._first))
                self._first.clear()
        return loss

    def _summary(self, difference: torch.Tensor) -> FirstStep:
        ratio = difference.exp()
        far = (ratio < 1 - self.epsilon_low) | (ratio > 1 + self.epsilon_high)
        some = difference.numel() > 0
        return FirstStep(
            rank=self.accelerator.process_index,
            step=self.state.global_step,
            tokens=difference.numel(),
            logprob_difference_mean=float(difference.abs().mean()) if some else 0.0,
            logprob_difference_max=float(difference.abs().max()) if some else 0.0,
            ratio_min=float(ratio.min()) if some else 1.0,
            ratio_max=float(ratio.max()) if some else 1.0,
            clipped=float(far.float().mean()) if some else 0.0,
        )

    def _describe(self, step: Step) -> None:
        """Record what the plan knows of a step: rewards by part, lengths, groups without a gradient. TRL's names."""
        samples = step.samples
        for part in PARTS:
            self._record(f"rewards/{part}/mean", float(samples[f"reward_{part}"].mean()))
        self._record("reward", float(samples["reward"].mean()))
        self._record("reward_std", float(samples["reward"].std(ddof=int(len(samples) > 1))))
        self._record("frac_reward_zero_std", step.equal_groups)
        self._record("completions/mean_length", float(samples["tokens"].mean()))
        self._record("completions/min_length", float(samples["tokens"].min()))
        self._record("completions/max_length", float(samples["tokens"].max()))
        self._record("completions/clipped_ratio", 1.0 - float(samples["finished"].mean()))

    def _record(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)


def named(part: str) -> Callable[..., list[float]]:
    """A name for TRL's list of reward functions, which is never called: rewards are computed in other places."""

    def never(**_: Any) -> list[float]:
        raise AssertionError(f"the reward {part} is not computed here")

    never.__name__ = part
    return never
