"""GRPO on stored rollouts, through TRL's trainer (Shao et al. 2024, arXiv:2402.03300; TRL 1.16).

TRL samples, grades and trains in one process. Here the samples were drawn and graded by other jobs, so of TRL only the
second half is used: the clipped loss, its normalisation over ranks and accumulated batches, optimizers, DeepSpeed.
`StoredRollouts` puts the plan's batches where TRL would generate, and takes the log-probabilities that the samples were
drawn with for the old policy's. So the importance ratio corrects for everything between sampling and now: updates of
this round, and differences between engines. In the first step it is 1 if tokens, pictures and ranks line up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hpc_rl.training import mismatch, plan, store
from hpc_rl.training.base import Tensors
from hpc_rl.training.batches import Batches, Pixels
from hpc_rl.training.checkpoints import Checkpoints
from hpc_rl.training.distributed import all_gather_objects
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.grpo_base import Grpo, grpo_config, options_of
from hpc_rl.training.mismatch import FirstStep
from hpc_rl.training.plan import Plan, Step
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.task import find

log = logging.getLogger(__name__)

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class StoredRollouts(Grpo):
    """GRPO on exactly the samples of a plan.

    Parameters
    ----------
    plan
        What to train on, the same on all ranks.
    batches
        This rank's part of it.
    """

    def __init__(self, *, plan: Plan, batches: Batches, parts: list[str], **others: Any) -> None:
        stand_in = Dataset.from_dict({"prompt": [""] * len(batches)})  # TRL wants one
        super().__init__(train_dataset=stand_in, batches=batches, parts=parts, **others)
        self._plan, self._parts = plan, parts
        self._logprobs: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self.first_step: FirstStep | None = None

    def _prepare_inputs(self, batch: Tensors) -> Tensors:
        """Tensors to the device, and with a KL term the log-probabilities under the initial model."""
        moved: Tensors = super()._prepare_inputs(batch)
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
                model, ids, mask, batch["completion_ids"].size(1), **{name: batch.get(name) for name in names}
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
        for name, value in mismatch.summary(self.accelerator.gather(mismatch.of_batch(difference)[None])).items():
            self._record(name, value)

    def training_step(self, model: Any, inputs: Tensors, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; with the last one of an optimizer step, its metrics."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._describe(self._plan[self.state.global_step])
            if self.first_step is None:
                self.first_step = FirstStep.of(
                    torch.cat(self._first), self.epsilon_low, self.epsilon_high,
                    rank=self.accelerator.process_index, step=self.state.global_step,
                )  # fmt: skip
                self._first.clear()
        return loss

    def _describe(self, step: Step) -> None:
        """Record what the plan knows of a step: rewards by part, lengths, groups without a gradient. TRL's names."""
        samples = step.samples
        for part in self._parts:
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


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`.

    Raises
    ------
    UnusableData
        When the samples were drawn with other weights than training begins with, or do not fit their pictures.
    """
    began = time.monotonic()
    task, options = run.task, options_of(run)
    size = task.sampling.samples_per_prompt
    rollouts = store.read(_files(run), list(task.rewards), size, task.groups, run.world.rank)
    if rollouts.weights_hash != run.start.hash:
        raise UnusableData(
            f"round {run.round} was sampled with weights {rollouts.weights_hash[:16]}, but training begins with "
            f"{run.start.hash[:16]} ({run.start.adapter or run.start.base}). Sample again: remove the round's sample "
            "and grade folders and launch."
        )
    made = plan.make(
        rollouts, run.shape, epochs=options.epochs, passes=options.passes, scale=options.scale_rewards,
        run_seed=run.job.config.run.seed, round=run.round,
    )  # fmt: skip
    counts = rollouts.counts
    log.info(
        "%d samples in %d groups, %d left out, %d groups dropped, %d with equal rewards; %d steps of up to %d",
        len(rollouts), counts.groups - counts.dropped_groups, counts.left_out, counts.dropped_groups,
        counts.equal_groups, len(made), made.shape.samples,
    )  # fmt: skip
    checkpoints = run.checkpoints(made.fingerprint())
    trainer = _trainer(run, made, checkpoints)
    run.seconds["loading"] = time.monotonic() - began
    result = run.train(trainer, checkpoints)
    first = all_gather_objects(trainer.first_step)
    if result is None:
        return None
    numbers = {
        **asdict(counts),
        "used_samples": len(rollouts),
        "tokens": made.tokens,
        "mean_reward": rollouts.mean(),
        **{f"mean_reward_{part}": rollouts.mean(part) for part in rollouts.parts},
        "first_step_by_rank": [asdict(one) for one in first if one is not None],
    }
    return Trained(result.weights, {**numbers, **result.metrics})


def _files(run: TrainRun) -> Iterator[Path]:
    """The round's graded samples, shard by shard. A generator: only the rank of a node that goes through it reads."""
    data = run.task.data
    assert data is not None
    for manifest in run.job.inputs(data.stage.round, data.stage.name):
        yield manifest.path(data.file)


def _trainer(run: TrainRun, made: Plan, checkpoints: Checkpoints) -> StoredRollouts:
    args = grpo_config(run, checkpoints.own)
    processor = run.processor()
    tokenizer = getattr(processor, "tokenizer", processor)
    model = run.model(tokenizer)
    pixels = None
    if run.task.pictures is not None:
        pixels = Pixels(processor.image_processor, find(run.task.pictures)(run.job))
    batches = Batches(
        made,
        made.shape,
        run.world.rank,
        pixels,
        pad_id=tokenizer.pad_token_id,
        image_id=getattr(model.config, "image_token_id", None),
        vision_ids=frozenset(getattr(model.config, name) for name in VISION_TOKENS if hasattr(model.config, name)),
    )
    return StoredRollouts(
        plan=made, batches=batches, parts=list(run.task.rewards), args=args, model=model, processor=processor,
        beta=options_of(run).beta, initial_model=lambda: run.initial_model(tokenizer), **run.driving(checkpoints),
    )  # fmt: skip
