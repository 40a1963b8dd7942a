"""A policy and a reward model trained in step on one round's solutions (A4, A5): L = L_policy + λ · L_RM.

L_policy is GRPO's on stored rollouts (`hpc_rl.training.algorithms.grpo`). The reward of a sample is α · correctness +
(1 − α) · score, where the score is what the reward model gave it when the round was graded, normalised within its
group: (s − mean) / (std + 1e-4), so 0 where all scores are equal. L_RM is one of
`hpc_rl.training.algorithms.pair_losses` on the round's labelled solutions, in which questions that are all right or all
wrong are left out (A4). Both are means over the optimizer step.

The models share no weights and each has an optimizer of its own, so the gradient of L is that of each loss for its
model, and L itself is only a number to look at. The questions of a step are not those of its rollouts, but of the same
round: as many steps go through all questions as through all rollouts.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch

from hpc_rl.config.training import JointTrainConfig
from hpc_rl.engines.loading import load_processor
from hpc_rl.run.seeds import derive
from hpc_rl.training import models
from hpc_rl.training.algorithms import grpo, stored
from hpc_rl.training.algorithms.grpo import StoredGrpo
from hpc_rl.training.algorithms.judging import Objective, Tally, in_float32, padding_of, scores
from hpc_rl.training.algorithms.stored import reference_weights, scoring, units_of
from hpc_rl.training.base import ROWS, SHARE, UNITS, Tensors
from hpc_rl.training.check_base import vocabulary
from hpc_rl.training.data import plan, solutions
from hpc_rl.training.data.batches import Batches, Maker
from hpc_rl.training.data.collate import Solutions
from hpc_rl.training.data.plan import Plan, Shape
from hpc_rl.training.data.rollouts import Rollout, Rollouts, advantages
from hpc_rl.training.data.solutions import Question
from hpc_rl.training.data.units import Units
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.second import Second
from hpc_rl.training.trl_parts import disable_dropout_in_model

__all__ = ["reference_weights", "scoring", "train", "units_of"]

log = logging.getLogger(__name__)

CORRECTNESS, SCORE = "correctness", "score"
"""Parts of the reward that the round's rollouts have."""
SECOND = "second"
"""Key of a batch: the reward model's. Folder in a checkpoint: the reward model's."""


def mixed(rollouts: Rollouts, alpha: float) -> Rollouts:
    """Rollouts rewarded with α · correctness + (1 − α) · score, normalised within the group (A5)."""
    right, score = (rollouts.index[f"reward_{part}"].astype("float64") for part in (CORRECTNESS, SCORE))
    return rollouts.with_rewards(alpha * right + (1 - alpha) * advantages(score, rollouts.starts))


class Both(Batches):
    """Batches of the policy, each with one of the reward model in it.

    Parameters
    ----------
    second
        The reward model's, as many.
    """

    def __init__(self, plan: Plan[Any], rank: int, *makers: Maker, second: Batches) -> None:
        super().__init__(plan, rank, *makers)
        assert len(second) == len(self), f"{len(second)} passes of the reward model, {len(self)} of the policy"
        self._second = second

    def __getitem__(self, number: int) -> Tensors:
        return {**super().__getitem__(number), SECOND: self._second[number]}


class JointGrpo(StoredGrpo):
    """GRPO on stored rollouts, and a reward model beside it.

    Parameters
    ----------
    second, objective, weight
        The reward model, what it is to learn, and λ.
    """

    def __init__(self, *, second: Second, objective: Objective, weight: float, **others: Any) -> None:
        super().__init__(**others)
        self.second, self._objective, self._weight = second, objective, weight
        self._tally = Tally()
        self._losses = torch.zeros(2, device=self.accelerator.device)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.second.prepare(self, max_steps)
        if resume_from_checkpoint is not None:
            self.second.load(Path(resume_from_checkpoint) / SECOND)
        return prepared

    def training_step(self, model: Any, inputs: Tensors, num_items_in_batch: Any = None) -> torch.Tensor:
        """A forward and backward pass of each model; with the last ones of an optimizer step, the step of each."""
        judged = inputs.pop(SECOND)
        policy: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        reward_model = self._judge(judged)
        self._losses += torch.stack([policy, reward_model])
        if self.accelerator.sync_gradients:
            both = self.accelerator.gather(self._losses[None]).mean(0).tolist()
            for name, value in zip(("policy", "reward_model"), both, strict=True):
                self._record(f"loss/{name}", value)
            self._losses.zero_()
        total: torch.Tensor = policy + self._weight * reward_model
        return total

    def _judge(self, batch: Tensors) -> torch.Tensor:
        """The reward model's pass; its part of L_RM. One without questions on any rank is left out: a step's last pass
        has some if any has (`hpc_rl.training.data.plan`), so a step without questions changes nothing."""
        units, share = batch.pop(UNITS), batch.pop(SHARE)
        if not any(batch.pop(ROWS)):
            return torch.zeros((), device=self.accelerator.device)
        moved = {name: of.to(self.accelerator.device) if torch.is_tensor(of) else of for name, of in batch.items()}
        with self.second.passing():
            with self.compute_loss_context_manager():
                found = scores(self.second.wrapped, moved)
                mean = self._objective(found, moved, units, self.state.global_step)
            loss = mean * share / self.current_gradient_accumulation_steps
            self.second.backward(self._weight * loss, tuple(units))
        if share:
            self._tally.add(found, moved)
        part: torch.Tensor = loss.detach()
        return part

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the numbers of all of the reward model's scores since the last time."""
        judged = self._tally.drain(self.accelerator)
        super().log(logs | {f"reward_model/{name}": value for name, value in judged.items()}, start_time)

    def _save_more(self, folder: Path) -> None:
        self.second.save(folder / SECOND)


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`.

    Raises
    ------
    ValueError
        When the rollouts have no parts `correctness` and `score`.
    """
    began = time.monotonic()
    options, role, start = run.task.settings, run.task.second, run.second
    assert isinstance(options, JointTrainConfig) and role is not None and start is not None
    if not {CORRECTNESS, SCORE} <= set(run.task.rewards):
        raise ValueError(
            f"the parts of the reward must be {CORRECTNESS} and {SCORE}, not {', '.join(run.task.rewards)}"
        )
    tokenizer = load_processor(start.base)
    pad_id = padding_of(tokenizer, start.base)
    questions = _read(run, tokenizer, pad_id, options)
    rollouts = stored.read(run, partial(mixed, alpha=options.alpha))
    made = stored.make_plan(run, rollouts)
    asked = _plan_beside(made, questions, run, options)
    section = role.model.model_dump_json(exclude={"path"})
    work = "\n".join((made.fingerprint(), questions.digest, start.hash, section))
    checkpoints = run.checkpoints(hashlib.sha256(work.encode()).hexdigest())

    def kind(**others: Any) -> StoredGrpo:
        seed = derive(run.job.config.run.seed, run.round, "adapter")  # as a reward model that is trained by itself
        model = models.load(
            role.model, start.base, start.adapter, deepspeed=run.deepspeed is not None, seed=seed, head="score"
        )
        model.config.get_text_config().pad_token_id = pad_id
        disable_dropout_in_model(model)
        objective = Objective(options.reward_model.loss, options.reward_model.penalty, others["args"].seed)
        second = Second(in_float32(model), tokenizer, options.reward_model)
        return JointGrpo(second=second, objective=objective, weight=options.reward_model_weight, **others)

    batches = partial(Both, second=Batches(asked, run.world.rank, Solutions(pad_id)))
    trainer = grpo.trainer_of(run, rollouts, made, checkpoints, kind, batches)
    assert isinstance(trainer, JointGrpo)
    result = stored.finish(run, trainer, checkpoints, began, trainer.second)
    if result is None:
        return None
    return replace(result, metrics={**result.metrics, "reward_model": questions.numbers()})


def _read(run: TrainRun, tokenizer: Any, pad_id: int, options: JointTrainConfig) -> Units[Question]:
    assert run.second is not None and run.task.second_data is not None
    own = options.reward_model
    return solutions.read(
        run.files(run.task.second_data), tokenizer, both=own.loss != "bce", system_prompt=own.system_prompt,
        max_length=own.max_length, too_long=own.too_long, vocabulary=vocabulary(run.second.base), pad_id=pad_id,
        rank=run.world.rank,
    )  # fmt: skip


def _plan_beside(
    made: Plan[Rollout], questions: Units[Question], run: TrainRun, options: JointTrainConfig
) -> Plan[Question]:
    """The questions in as many steps as the rollouts, epoch by epoch and pass by pass, as many in each as it takes."""
    steps = len(made) // (options.epochs * options.passes)
    ranks, accumulation = made.shape.ranks, made.shape.accumulation
    shape = Shape(ranks, accumulation, ceil(len(questions) / (steps * ranks * accumulation)))
    return plan.make(
        questions, shape, epochs=options.epochs, passes=options.passes, steps=steps,
        run_seed=run.job.config.run.seed, round=run.round,
    )  # fmt: skip
