"""RLOO on stored rollouts, through TRL's trainer (Ahmadian et al. 2024, arXiv:2402.14740; TRL 1.16; S10).

    R = r − β Σ_t (log π_old(t) − log π_ref(t))                    A = R − mean of the group's others
    L = mean − min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A)              ρ = Π_t π(t) / π_old(t), of a whole completion

Unlike in GRPO the ratio is that of whole completions, the divergence is a part of the reward, and nothing is divided by
the group's deviation.

π_old is scored anew by the engine that trains, in one pass before the first step. The sampler's log-probabilities would
not do: its rounding errors add up over a completion, and in bfloat16 ρ could be outside of 1 ± ε before anything was
learned. How far the sampler is from the trainer is logged.

Where we differ from TRL: samples whose grading failed are no rows of a batch; groups with equal rewards are left out; a
mean is over the rows of the whole optimizer step; `normalize_advantages` takes mean and deviation of the whole round.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_rl.config.training import RlooTrainConfig
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.training import logprobs
from hpc_rl.training.algorithms import stored
from hpc_rl.training.algorithms.grpo_base import OnPolicy, common, options_of
from hpc_rl.training.algorithms.stored import Stored, reference_weights, scoring, units_of
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.collate import ByPlace
from hpc_rl.training.data.plan import Step
from hpc_rl.training.data.rollouts import EPSILON, Rollout, Rollouts
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.trl_parts import RLOOConfig, RLOOTrainer

__all__ = ["Rloo", "StoredRloo", "advantages", "reference_weights", "rloo_config", "scoring", "train", "units_of"]


class Rloo(OnPolicy, RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOO trainer."""


class StoredRloo(Stored, Rloo):
    """RLOO on exactly the samples of a plan.

    Parameters
    ----------
    divergence
        (N,) of each sample, as in `advantages`; None where it counts for nothing.
    """

    def __init__(self, *, divergence: NDArray[np.float64] | None, **others: Any) -> None:
        super().__init__(**others)
        self._divergence = divergence

    def _describe(self, step: Step[Rollout]) -> None:
        super()._describe(step)
        if self._divergence is not None:
            self._record("kl", float(self._divergence[step.places].sum() / step.total("tokens")))


def rloo_config(run: TrainRun, output: Path, **more: Any) -> RLOOConfig:
    """Settings of TRL's trainer. Make them before the model: with ZeRO-3 they decide how models are loaded."""
    options = options_of(run)
    assert isinstance(options, RlooTrainConfig)
    clip = options.reward_clip
    return RLOOConfig(
        **common(run, output),
        reward_clip_range=None if clip is None else (-clip, clip),
        normalize_advantages=options.normalize_advantages,
        **more,
    )


def advantages(rollouts: Rollouts, divergence: NDArray[np.float64], options: RlooTrainConfig) -> NDArray[np.float64]:
    """(N,) A of the formula above.

    Parameters
    ----------
    divergence
        (N,) Σ_t log π_old(t) − log π_ref(t) of each sample.
    """
    rewards = rollouts.rewards - options.beta * divergence
    sizes = np.diff(rollouts.starts)
    others = np.repeat(np.add.reduceat(rewards, rollouts.starts[:-1]), sizes) - rewards
    found: NDArray[np.float64] = rewards - others / np.repeat(sizes - 1, sizes)
    if options.normalize_advantages:
        found = (found - found.mean()) / (found.std(ddof=1) + EPSILON)
    return found


def clipped(rollouts: Rollouts, clip: float | None) -> Rollouts:
    """The same samples with rewards between −clip and clip; the round's mean reward stays what it is."""
    if clip is None:
        return rollouts
    means = {"reward": rollouts.mean(), **{f"reward_{part}": rollouts.mean(part) for part in rollouts.parts}}
    return replace(rollouts.with_rewards(rollouts.rewards.clip(-clip, clip)), means=means)


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    began, options = time.monotonic(), options_of(run)
    assert isinstance(options, RlooTrainConfig)
    rollouts = stored.read(run, lambda found: clipped(found, options.reward_clip))
    made = stored.make_plan(run, rollouts)
    checkpoints = run.checkpoints(made.fingerprint())
    args = rloo_config(run, checkpoints.own)
    tensors = stored.tensors(run)
    asked = stored.scoring_of(run, rollouts, tensors)
    old = logprobs.by_pass(run, checkpoints, run.start, asked).sums(rollouts)
    divergence = np.zeros(len(rollouts))
    if options.beta:
        initial = logprobs.reference(run, checkpoints, reference_weights(run), asked)
        divergence = old - initial.sums(rollouts)
    worth = ByPlace(old_logps=old, advantages=advantages(rollouts, divergence, options))
    processor = run.processor()
    trainer = StoredRloo(
        plan=made, rollouts=rollouts, batches=Batches(made, run.world.rank, tensors, worth),
        parts=list(run.task.rewards), args=args, model=run.model(tokenizer_of(processor)), processor=processor,
        beta=0.0, initial_model=None, divergence=divergence if options.beta else None, **run.driving(checkpoints),
    )  # fmt: skip
    return stored.finish(run, trainer, checkpoints, began)
