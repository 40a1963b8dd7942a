"""Reward models and verifiers, through TRL's trainer (V9, V10, T9, A2; TRL 1.16).

A model with one output scores a question's solutions at their last token. The losses are those of
`hpc_rl.training.algorithms.pair_losses`; with two solutions of each question and no penalty that is TRL's own. We
differ from TRL: a unit is a question with all of its labelled solutions, so n forward passes give k(n−k) pairs; the
penalty is V10's, on the square of each score, and not on that of their sum; the head reckons in float32 in every number
type, as it does where the model is served. As in TRL there is no dropout, a LoRA adapter's neither: a pair is compared
by one model.

A verifier is the same under another name: its recipe says from which weights it begins each round (V11).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from datasets import Dataset

from hpc_rl.config.training import RewardTrainConfig
from hpc_rl.training import settings
from hpc_rl.training.algorithms.judging import Objective, Tally, in_float32, padding_of, scores
from hpc_rl.training.base import Driven, Tensors
from hpc_rl.training.check_base import vocabulary
from hpc_rl.training.data import batches, collate, plan, solutions
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.trl_parts import RewardConfig, RewardTrainer

log = logging.getLogger(__name__)


class _OnSolutions(RewardTrainer):  # type: ignore[misc]
    """TRL's trainer with our loss in the place of its own."""

    def __init__(self, *, objective: Objective, **trl: Any) -> None:
        self._objective, self._tally = objective, Tally()
        super().__init__(**trl)

    def compute_loss(
        self, model: Any, inputs: Tensors, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean over the pass's questions."""
        found = scores(model, inputs)
        if self._share:
            self._tally.add(found, inputs)
        return self._objective(found, inputs, self._units, self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the numbers of all scores since the last time."""
        super().log(logs | self._tally.drain(self.accelerator), start_time)


class RewardModel(Driven, _OnSolutions):
    """A reward model on the questions of a plan.

    Parameters
    ----------
    objective
        What it is to learn.
    others
        Of `Driven` and of TRL's trainer.
    """

    def __init__(self, *, objective: Objective, model: Any, **others: Any) -> None:
        stand_in = Dataset.from_dict({"chosen_ids": [[0]], "rejected_ids": [[0]]})  # TRL wants one
        super().__init__(objective=objective, model=in_float32(model), train_dataset=stand_in, **others)


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`.

    Raises
    ------
    ValueError
        When the tokenizer has no padding token of its own.
    """
    began = time.monotonic()
    options = run.task.settings
    assert isinstance(options, RewardTrainConfig)
    tokenizer = run.processor()
    pad_id = padding_of(tokenizer, run.start.base)
    questions = solutions.read(
        run.files(), tokenizer, both=options.loss != "bce", system_prompt=options.system_prompt,
        max_length=options.max_length, too_long=options.too_long, vocabulary=vocabulary(run.start.base),
        pad_id=pad_id, rank=run.world.rank,
    )  # fmt: skip
    made = plan.make(questions, run.shape, epochs=options.epochs, run_seed=run.job.config.run.seed, round=run.round)
    checkpoints = run.checkpoints(made.fingerprint())
    args = RewardConfig(**settings.common(run, checkpoints.own))
    trainer = RewardModel(
        objective=Objective(options.loss, options.penalty, args.seed),
        batches=batches.Batches(made, run.world.rank, collate.Solutions(pad_id)),
        args=args, model=run.model(tokenizer, head="score"), processing_class=tokenizer, **run.driving(checkpoints),
    )  # fmt: skip
    run.seconds["loading"] = time.monotonic() - began
    result = run.train(trainer, checkpoints)
    return None if result is None else Trained(result.weights, {**questions.numbers(), **result.metrics})
