"""`rollouts: round`: train on the samples that other jobs drew and graded."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict

from hpc_rl.data.images import load_image
from hpc_rl.training import plan, settings
from hpc_rl.training.batches import Batches, Pixels
from hpc_rl.training.checkpoints import Checkpoints
from hpc_rl.training.distributed import all_gather_objects
from hpc_rl.training.grpo import StoredRollouts
from hpc_rl.training.one_round import RoundTraining, Trained
from hpc_rl.training.rollouts import PARTS, Rollouts, UnusableRollouts

log = logging.getLogger(__name__)

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def train(training: RoundTraining, rollouts: Rollouts) -> Trained | None:
    """Train on a round's stored rollouts. All ranks must call it, with the same rollouts.

    What it returns is what `RoundTraining.run` says.

    Raises
    ------
    UnusableRollouts
        When they were drawn with other weights than training begins with, or do not fit their pictures.
    SystemExit
        When told to leave before the last step; a checkpoint was made.
    """
    began = time.monotonic()
    start, config = training.start, training.config
    if rollouts.weights_hash != start.weights:
        raise UnusableRollouts(
            f"round {training.round} was sampled with weights {rollouts.weights_hash[:16]}, but training begins with "
            f"{start.weights[:16]} ({start.adapter or start.base}). Sample again: remove the round's sample and grade "
            "folders and launch."
        )
    made = plan.make(
        rollouts, settings.shape_of(config, training.world), epochs=config.train.epochs, passes=config.train.passes,
        scale=config.train.scale_rewards, run_seed=config.run.seed, round=training.round,
    )  # fmt: skip
    counts = rollouts.counts
    log.info(
        "%d samples in %d groups, %d left out, %d groups dropped, %d with equal rewards; %d steps of up to %d",
        len(rollouts), counts.groups - counts.dropped_groups, counts.left_out, counts.dropped_groups,
        counts.equal_groups, len(made), made.shape.samples,
    )  # fmt: skip
    checkpoints = training.checkpoints(made.fingerprint())
    trainer = _trainer(training, made, checkpoints)
    training.seconds["loading"] = time.monotonic() - began
    result = training.run(trainer, checkpoints)
    first = all_gather_objects(trainer.first_step)
    if result is None:
        return None
    numbers = {
        **asdict(counts),
        "used_samples": len(rollouts),
        "tokens": made.tokens,
        "mean_reward": rollouts.mean(),
        **{f"mean_reward_{part}": rollouts.mean(part) for part in PARTS},
        "first_step_by_rank": [asdict(one) for one in first if one is not None],
    }
    return Trained(result.weights, {**numbers, **result.metrics})


def _trainer(training: RoundTraining, made: plan.Plan, checkpoints: Checkpoints) -> StoredRollouts:
    args = settings.grpo_config(training.config, training.deepspeed, checkpoints.own, round=training.round)
    processor = training.processor()
    tokenizer = processor.tokenizer
    model = training.model(tokenizer)
    root, row_of = training.start.image_root, training.start.row_of
    batches = Batches(
        made,
        made.shape,
        training.world.rank,
        Pixels(processor.image_processor, lambda row_id: [load_image(root / row_of(row_id).image)]),
        pad_id=tokenizer.pad_token_id,
        image_id=model.config.image_token_id,
        vision_ids=frozenset(getattr(model.config, name) for name in VISION_TOKENS if hasattr(model.config, name)),
    )
    parts = training.trainer_parts(tokenizer, checkpoints)
    return StoredRollouts(plan=made, batches=batches, args=args, model=model, processor=processor, **parts)
