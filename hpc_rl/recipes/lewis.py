"""The Lewis game: a speaker describes an image, a listener must pick it out by the description (systems.md, L).

    round 0   prepare (one shard per category) → dataset → evaluate: the untrained speaker
    round r   sample → grade → train → evaluate                        with `train.rollouts: round`
              train → evaluate: the trainer samples by itself          with `train.rollouts: live`

With `train.beta` above 0 and `train.reference: stage`, a stage of its own scores the samples under the initial model:
sample → grade → reference → train → evaluate.

grade, evaluate and a live train ask a listener service of their own, which is up only while they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from pathlib import Path

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.recipes import reference
from hpc_rl.recipes.lewis_report import REPORT as REPORT
from hpc_rl.recipes.parts import evaluation_stage, sampling_stage, training_stage, with_service
from hpc_rl.sampling.source import SampleTask
from hpc_rl.training.task import Data, TrainTask


def resolve(config: LewisConfig) -> LewisConfig:
    """The config with what must be known to plan: the categories, which are the shards of `prepare`."""
    data = config.data
    if data.categories is not None:
        return config
    if data.scenes:
        from hpc_rl.data import scenes  # numpy and Pillow: only for runs that render

        found = scenes.categories()
    else:
        from hpc_rl.data.image_folder import list_categories

        assert data.image_root is not None, "the config has either scenes or an image_root"
        found = list_categories(Path(data.image_root))
    return config.model_copy(update={"data": data.model_copy(update={"categories": tuple(found)})})


def stages(config: LewisConfig, round: int) -> Iterable[Stage]:
    """The stages of a round, each after what it needs."""
    if round == 0:
        yield from _preparation(config)
        return
    live = config.train.rollouts == "live"
    weights = StageId(round - 1, "train") if round > 1 else StageId(0, "dataset")
    needs: tuple[StageId, ...] = (weights,)
    if not live:
        shards = ceil(config.sample.prompts_per_round / config.sample.shard_size)
        sample = StageId(round, "sample")
        yield sampling_stage(config, sample, (weights,), shards)
        grade = StageId(round, "grade")
        graded = Stage(grade, "jobs.lewis.grade", Kind.ARRAY, needs=(sample,), shards=shards)
        yield from with_service(config, graded, "listener")
        needs = (grade,)
        if config.train.reference_stage:
            yield reference.stage(grade, shards=shards, settings=config.train)
            needs = (grade, StageId(round, reference.NAME))
    train = training_stage(StageId(round, "train"), needs, config.train, "train")
    yield from with_service(config, train, "listener") if live else (train,)
    yield from _evaluation(config, round, train.id)


def sampling(config: LewisConfig, stage: StageId) -> SampleTask:
    """Descriptions of the round's images."""
    return SampleTask(Role("speaker", config.speaker), stage.round - 1, config.sample, "hpc_rl.sampling.lewis:source")


def training(config: LewisConfig, stage: StageId) -> TrainTask:
    """GRPO of the speaker, on the round's graded samples or on what it draws while it trains."""
    live = config.train.rollouts == "live"
    return TrainTask(
        algorithm="grpo_live" if live else "grpo",
        settings=config.train,
        section="train",
        role=Role("speaker", config.speaker),
        trained_round=stage.round - 1,
        data=None if live else Data(StageId(stage.round, "grade"), "graded.parquet"),
        reference=reference.output(stage.round) if config.train.reference_stage else None,
        sampling=config.sample,
        groups=config.sample.prompts_per_round,
        rewards={name: getattr(config.rewards, name).weight for name in ("accuracy", "format", "length")},
        pictures="hpc_rl.training.lewis_game:pictures",
        live="hpc_rl.training.lewis_game:play" if live else None,
    )


def _preparation(config: LewisConfig) -> Iterable[Stage]:
    # without categories this is a plan for people (--dry-run on a machine that lacks the images), not one that is run
    categories = config.data.categories or ("unknown",)
    prepare, dataset = StageId(0, "prepare"), StageId(0, "dataset")
    yield Stage(prepare, "jobs.lewis.prepare", Kind.ARRAY, shards=len(categories))
    yield Stage(dataset, "jobs.lewis.dataset", Kind.SINGLE, needs=(prepare,))
    yield from _evaluation(config, 0, dataset)


def _evaluation(config: LewisConfig, round: int, after: StageId) -> Iterable[Stage]:
    stage = evaluation_stage(config, StageId(round, "evaluate"), "jobs.lewis.evaluate", (after,))
    yield from with_service(config, stage, "listener")
