"""What GRPO and RLOO on stored rollouts have in common: whose rollouts they are, and how far the policy is from theirs.

TRL samples, grades and trains in one process. Here the samples were drawn and graded by other jobs, so of TRL only the
second half is used: the loss, its normalisation over ranks and accumulated batches, optimizers, DeepSpeed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig

from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.engines.weights import Weights, weights_of
from hpc_rl.training import logprobs, settings
from hpc_rl.training.algorithms import mismatch
from hpc_rl.training.algorithms.grpo_base import OnPolicy, options_of
from hpc_rl.training.algorithms.mismatch import FirstStep
from hpc_rl.training.base import Tensors
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.data import collate, pixels, plan, store
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.plan import Plan, Step
from hpc_rl.training.data.rollouts import Rollout, Rollouts
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.ranks.distributed import all_gather_objects, broadcast_object
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.second import Second

log = logging.getLogger(__name__)

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class Stored(OnPolicy):
    """Before TRL's trainer in the list of bases: it is trained on exactly the samples of a plan.

    Parameters
    ----------
    plan, rollouts
        What to train on, the same on all ranks.
    batches
        This rank's part of it.
    """

    _metrics: Any
    epsilon_low: float
    epsilon_high: float

    def __init__(
        self, *, plan: Plan[Rollout], rollouts: Rollouts, batches: Batches, parts: list[str], **others: Any
    ) -> None:
        stand_in = Dataset.from_dict({"prompt": [""] * len(batches)})  # TRL wants one
        super().__init__(train_dataset=stand_in, batches=batches, parts=parts, **others)
        self._plan, self._rollouts, self._parts = plan, rollouts, parts
        self._logprobs: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self.first_step: FirstStep | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]
        self._logprobs = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: Tensors) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        theirs = "sampling_per_token_logps" if "sampling_per_token_logps" in inputs else "old_per_token_logps"
        sampled, now = inputs[theirs], self._logprobs
        assert now is not None, "the loss is computed from the policy's log-probabilities"
        self._compare((now - sampled)[inputs["completion_mask"].bool()].float())
        if "beyond_cap" in inputs:
            self._count_corrections(inputs)
        return loss

    def _count_corrections(self, inputs: Tensors) -> None:
        """Record the mean weight, and the share that was beyond the cap, of all ranks' tokens or completions."""
        weights, mask = inputs["importance_sampling_ratio"], inputs["completion_mask"].bool()
        real = mask if weights.shape == mask.shape else mask.any(1, keepdim=True)
        ours = torch.stack([weights[real].sum(), inputs["beyond_cap"][real].sum(), real.sum()])
        total, beyond, number = self.accelerator.gather(ours[None]).sum(0).tolist()
        if number:
            self._record("sampling/importance_ratio_mean", total / number)
            self._record("sampling/beyond_cap", beyond / number)

    def _compare(self, difference: torch.Tensor) -> None:
        """Record how far the policy is from the one that sampled, over the tokens of all ranks' batches."""
        if self.first_step is None:
            self._first.append(difference)
        for name, value in mismatch.summary(self.accelerator.gather(mismatch.of_batch(difference)[None])).items():
            self._record(name, value)

    def training_step(self, model: Any, inputs: Tensors, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; with the last one of an optimizer step, its metrics."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            self._describe(self._plan[self.state.global_step])
            if self.first_step is None:
                self.first_step = FirstStep.of(
                    torch.cat(self._first), self.epsilon_low, self.epsilon_high,
                    rank=self.accelerator.process_index, step=self.state.global_step,
                )  # fmt: skip
                self._first.clear()
        return loss

    def _describe(self, step: Step[Rollout]) -> None:
        """Record what the plan knows of a step: rewards by part, lengths, groups without a gradient. TRL's names."""
        samples = step.index
        for part in self._parts:
            self._record(f"rewards/{part}/mean", float(samples[f"reward_{part}"].mean()))
        self._record("reward", float(samples["reward"].mean()))
        self._record("reward_std", float(samples["reward"].std(ddof=int(len(samples) > 1))))
        self._record("frac_reward_zero_std", self._rollouts.share_of_equal(step.places))
        self._record("completions/mean_length", float(samples["tokens"].mean()))
        self._record("completions/min_length", float(samples["tokens"].min()))
        self._record("completions/max_length", float(samples["tokens"].max()))
        self._record("completions/clipped_ratio", 1.0 - float(samples["finished"].mean()))

    def _record(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)


def read(run: TrainRun, rewarded: Callable[[Rollouts], Rollouts] = lambda rollouts: rollouts) -> Rollouts:
    """The round's samples, those that say something. All ranks must call it.

    Parameters
    ----------
    rewarded
        Gives them other rewards than they have.

    Raises
    ------
    UnusableData
        When they were drawn with other weights than training begins with.
    NothingToLearn
        When no group is left whose rewards differ.
    """
    rollouts = units_of(run, run.files())
    if rollouts.weights_hash != run.start.hash:
        raise UnusableData(
            f"round {run.round} was sampled with weights {rollouts.weights_hash[:16]}, but training begins with "
            f"{run.start.hash[:16]} ({run.start.adapter or run.start.base}). Sample again: remove the round's folders "
            "of what was sampled and graded, and launch."
        )
    rollouts = rewarded(rollouts)
    return rollouts.without_equal_groups() if options_of(run).drop_equal_groups else rollouts


def units_of(run: TrainRun, files: Iterable[Path]) -> Rollouts:
    """The samples of some shards. Only the first rank of each node goes through `files`."""
    task = run.task
    return store.read(files, list(task.rewards), task.sampling.samples_per_prompt, task.groups, run.world.rank)


def make_plan(run: TrainRun, rollouts: Rollouts) -> Plan[Rollout]:
    """The optimizer steps of the round."""
    options, counts = options_of(run), rollouts.counts
    made = plan.make(
        rollouts, run.shape, epochs=options.epochs, passes=options.passes, run_seed=run.job.config.run.seed,
        round=run.round,
    )  # fmt: skip
    log.info(
        "%d samples in %d groups, %d left out, %d groups dropped, %d with equal rewards%s; %d steps of up to %d",
        len(rollouts), counts.groups - counts.dropped_groups, counts.left_out, counts.dropped_groups,
        counts.equal_groups, " (dropped too)" * options.drop_equal_groups, len(made), made.shape.samples,
    )  # fmt: skip
    return made


def tensors(run: TrainRun) -> collate.Rollouts:
    """What makes tensors of samples."""
    processor = run.processor()
    config = AutoConfig.from_pretrained(run.start.base, local_files_only=True)
    vision = frozenset(getattr(config, name) for name in VISION_TOKENS if hasattr(config, name))
    pad_id = settings.padding(tokenizer_of(processor))
    return collate.Rollouts(pad_id, vision_ids=vision, pictures=pixels.pictures(run, processor))


def reference_weights(run: TrainRun) -> Weights:
    """What KL is measured to: the run's initial model. All ranks must call it."""
    weights = weights_of(run.job.ws, run.task.role, 0) if run.world.is_main else run.start
    return broadcast_object(weights)


def scoring(run: TrainRun, units: Rollouts) -> logprobs.Scoring:
    """What `jobs.reference` computes of samples."""
    return scoring_of(run, units, tensors(run))


def scoring_of(run: TrainRun, rollouts: Rollouts, made_by: collate.Rollouts) -> logprobs.Scoring:
    """Log-probabilities of the sampled tokens, as far as `made_by` shows them."""
    batches = Batches(plan.in_order(rollouts, run.shape), run.world.rank, made_by)
    return logprobs.Scoring(rollouts, batches, logprobs.completions, run.task.sampling.temperature)


def finish(
    run: TrainRun, trainer: Stored, checkpoints: Checkpoints, began: float, second: Second | None = None
) -> Trained | None:
    """Train to the end, and say what was trained on. `began`: when the first file was opened."""
    run.seconds["loading"] = time.monotonic() - began - run.seconds.get("scoring", 0.0)
    result = run.train(trainer, checkpoints, second)
    first = all_gather_objects(trainer.first_step)
    if result is None:
        return None
    rollouts, counts = trainer._rollouts, trainer._rollouts.counts
    numbers = {
        **asdict(counts),
        "used_samples": len(rollouts),
        **{name: number for name, number in rollouts.numbers().items() if name.startswith("length_")},
        "tokens": trainer._plan.total("tokens"),
        "mean_reward": rollouts.mean(),
        **{f"mean_reward_{part}": rollouts.mean(part) for part in rollouts.parts},
        "first_step_by_rank": [asdict(one) for one in first if one is not None],
    }
    return replace(result, metrics={**numbers, **result.metrics})
