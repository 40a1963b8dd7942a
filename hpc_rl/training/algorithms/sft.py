"""Supervised fine-tuning on completions, through TRL's trainer (TRL 1.16).

The loss is −log π(token | prompt, tokens before it), as a mean over the completion tokens of the whole optimizer step,
all ranks and all accumulated passes: a long text counts more than a short one. It is TRL's, `completion_only_loss`
included. We differ from it in packing: texts are fitted into rows over all data of the round and not over a thousand at
a time, and none is cut in two. Texts of one row do not see each other, so packing changes no text's loss.
"""

from __future__ import annotations

import time
from typing import Any

from datasets import Dataset

from hpc_rl.config.modeling import VisionModelConfig
from hpc_rl.config.training import SftTrainConfig
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.training import settings
from hpc_rl.training.base import CountsTokens, Driven
from hpc_rl.training.check_base import vocabulary
from hpc_rl.training.data import collate, plan, texts
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.units import Units
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.trl_parts import SFTConfig, SFTTrainer


class Sft(CountsTokens, Driven, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer on the texts, or packs of texts, of a plan."""

    mean_over_rows = False

    def __init__(self, **others: Any) -> None:
        stand_in = Dataset.from_dict({"prompt": [""], "completion": [""]})  # TRL wants one
        super().__init__(train_dataset=stand_in, **others)


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    return fit(run, Sft, weighted=False)


def fit(run: TrainRun, trainer_class: type[Sft], *, weighted: bool) -> Trained | None:
    """Train on texts; see `train`.

    Parameters
    ----------
    weighted
        Whether texts have weights, which are a tensor of each batch then.

    Raises
    ------
    ValueError
        When a model that sees is to read packed texts: it counts positions in more than one dimension. When the task
        has pictures.
    """
    began = time.monotonic()
    task, options = run.task, run.task.settings
    assert isinstance(options, SftTrainConfig)
    if task.pictures is not None:
        raise ValueError(f"{task.section} is trained on texts alone, but its task names pictures: {task.pictures}")
    if options.packing and isinstance(task.role.model, VisionModelConfig):
        raise ValueError(f"{task.section}.packing is true, which is for models without pictures: set it false")
    processor = run.processor()
    tokenizer = tokenizer_of(processor)
    units: Units[Any] = texts.read(
        run.files(), tokenizer, max_length=options.max_length, too_long=options.too_long,
        vocabulary=vocabulary(run.start.base), weighted=weighted, rank=run.world.rank,
        variables=task.role.model.chat_template_kwargs,
    )  # fmt: skip
    maker: Any = collate.Texts(settings.padding(tokenizer), weighted)
    if options.packing:
        assert options.max_length is not None, "checked with the config"
        units, maker = texts.pack(units, options.max_length), collate.Packs(weighted)
    made = plan.make(units, run.shape, epochs=options.epochs, run_seed=run.job.config.run.seed, round=run.round)
    checkpoints = run.checkpoints(made.fingerprint())
    args = SFTConfig(**settings.common(run, checkpoints.own))
    trainer = trainer_class(
        batches=Batches(made, run.world.rank, maker), args=args, model=run.model(None), processing_class=processor,
        **run.driving(checkpoints),
    )  # fmt: skip
    run.seconds["loading"] = time.monotonic() - began
    result = run.train(trainer, checkpoints)
    return None if result is None else Trained(result.weights, {**units.numbers(), **result.metrics})
