"""Direct preference optimisation, through TRL's trainer (S5, S6; Rafailov et al. 2023, arXiv:2305.18290; TRL 1.16).

The loss of a pair is −log σ(β[Δ log π − Δ log π_ref]), Δ between the chosen and the rejected completion, log π the sum
over a completion's tokens, π_ref the model at the start of the round; its mean is over the pairs of the whole optimizer
step. `nll_weight` adds the chosen completions' mean −log π per token of a forward pass, `label_smoothing` makes it
robust DPO (arXiv:2403.00409). All of this is TRL's.

We differ from TRL in where log π_ref comes from: by default from one pass over the data before training
(`hpc_rl.training.logprobs`), also where prompts show pictures, so that no second model is in memory, and no second
adapter either.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from hpc_rl.config.training import DpoTrainConfig
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.engines.weights import Weights
from hpc_rl.training import logprobs, models, settings
from hpc_rl.training.base import CountsTokens, Driven
from hpc_rl.training.check_base import vocabulary
from hpc_rl.training.data import pairs, pixels, plan
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.collate import ByPlace, Pairs
from hpc_rl.training.data.units import Units
from hpc_rl.training.errors import NothingToLearn
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.scores import Scores
from hpc_rl.training.trl_parts import DPOConfig, DPOTrainer
from hpc_rl.training.validation import Validation


class Dpo(CountsTokens, Driven, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on the pairs of a plan, whose batches hold `ref_chosen_logps` and `ref_rejected_logps` (B,).

    With `ref_model` they need not.
    """

    def __init__(self, **others: Any) -> None:
        stand_in = Dataset.from_dict({"prompt": [""], "chosen": [""], "rejected": [""]})  # TRL wants one
        super().__init__(train_dataset=stand_in, **others)
        if "ref" in getattr(self.model, "peft_config", {}):  # TRL's copy of the adapter, for the passes that we spare
            self.model.delete_adapter("ref")

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """They are in the batches."""
        return dataset


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    began = time.monotonic()
    options, processor = _options(run), run.processor()
    every = _scoring(run, _read(run, processor, run.files(), _validation_files(run)), processor)
    units, measured = pairs.split(every.units)
    if not len(units):
        raise NothingToLearn(f"no pair is left to train on; {len(measured)} are there for validation")
    made = plan.make(units, run.shape, epochs=options.epochs, run_seed=run.job.config.run.seed, round=run.round)
    checkpoints = run.checkpoints(made.fingerprint())
    args = dpo_config(options, **settings.common(run, checkpoints.own))
    makers: list[Any] = [_tensors(run, processor)]
    reference, known = None, None
    if options.reference == "live":
        if len(measured):
            known = logprobs.by_pass(run, checkpoints, reference_weights(run), _scoring(run, measured, processor))
        start, deepspeed = reference_weights(run), run.deepspeed is not None
        reference = models.load_frozen(run.task.role.model, start.base, start.adapter, deepspeed=deepspeed)
    else:
        known = logprobs.reference(run, checkpoints, reference_weights(run), every)
        makers.append(_of(known, units))
    validation = None
    if known is not None and len(measured):
        validation = Validation(_scoring(run, measured, processor, _of(known, measured)), options.beta)
    trainer = Dpo(
        batches=Batches(made, run.world.rank, *makers), args=args, model=run.model(None), ref_model=reference,
        processing_class=processor, **run.driving(checkpoints),
    )  # fmt: skip
    run.seconds["loading"] = time.monotonic() - began - run.seconds.get("scoring", 0.0)
    result = run.train(trainer, checkpoints, validation=validation)
    return None if result is None else Trained(result.weights, {**units.numbers(), **result.metrics})


def reference_weights(run: TrainRun) -> Weights:
    """The model at the start of the round (S6)."""
    return run.start


def units_of(run: TrainRun, files: Iterable[Path]) -> Units[pairs.Pair]:
    """All pairs of some files, those for validation too: the reference is to score each once."""
    return _read(run, run.processor(), files)


def scoring(run: TrainRun, units: Units[pairs.Pair]) -> logprobs.Scoring:
    """What `jobs.reference` computes of pairs."""
    return _scoring(run, units, run.processor())


def _read(run: TrainRun, processor: Any, files: Iterable[Path], measured: Iterable[Path] = ()) -> Units[pairs.Pair]:
    options = _options(run)
    return pairs.read(
        files, tokenizer_of(processor), max_length=options.max_length, too_long=options.too_long,
        vocabulary=vocabulary(run.start.base), with_rows=run.task.pictures is not None, rank=run.world.rank,
        measured=measured, variables=run.task.role.model.chat_template_kwargs,
    )  # fmt: skip


def _validation_files(run: TrainRun) -> Iterable[Path]:
    data, file = run.task.data, run.task.validation
    return () if data is None or file is None else run.files(replace(data, file=file))


def _scoring(run: TrainRun, units: Units[pairs.Pair], processor: Any, *more: Any) -> logprobs.Scoring:
    batches = Batches(plan.in_order(units, run.shape), run.world.rank, _tensors(run, processor), *more)
    return logprobs.Scoring(units, batches, logprobs.pairs, banned=False)


def _of(known: Scores, units: Units[pairs.Pair]) -> ByPlace:
    """What the reference says of each pair, for its batch."""
    table = known.table(units)
    return ByPlace(ref_chosen_logps=table[:, 0], ref_rejected_logps=table[:, 1])


def dpo_config(options: DpoTrainConfig, **common: Any) -> DPOConfig:
    """Settings of TRL's trainer. Make them before the model: with ZeRO-3 they decide how models are loaded."""
    losses = {"robust" if options.label_smoothing else "sigmoid": 1.0}
    if options.nll_weight:
        losses["sft"] = options.nll_weight
    return DPOConfig(
        **common,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        precompute_ref_log_probs=options.reference != "live",
        max_length=None,
    )


def _tensors(run: TrainRun, processor: Any) -> Pairs:
    return Pairs(settings.padding(tokenizer_of(processor)), pixels.pictures(run, processor))


def _options(run: TrainRun) -> DpoTrainConfig:
    options = run.task.settings
    assert isinstance(options, DpoTrainConfig)
    return options
