"""Progressive solver training: a solver answers questions, teachers grade it and write harder ones (systems.md, S).

    round 0   pool: the question file, split → evaluate: the untrained solver
    round r   collect → grade → dpo_data → train → evaluate     the solver gets better,
                           ↘ enhance → pool                     and its next questions harder, at the same time

Rounds before `train_start_round` only collect data. With `backend: rloo` the solver is trained on the graded attempts
themselves. With a `generator`, `train_generator` teaches a model to write questions. With `dpo.reference: stage` (or
RLOO's, with a `beta`) a stage of its own scores the data under the reference: the solver of the round's start (S6), or,
for RLOO, that of the run's.

grade and enhance ask a teacher: an endpoint that `services` names, or a service of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.engines.weights import Role
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.recipes import reference
from hpc_rl.recipes.parts import evaluation_stage, sampling_stage, training_stage, with_service
from hpc_rl.recipes.prosetting_report import REPORT as REPORT
from hpc_rl.sampling.source import SampleTask
from hpc_rl.training.task import Data, TrainTask

BODIES = "jobs.prosetting"
PAIRS, VALIDATION, GENERATOR = "train.parquet", "validation.parquet", "generator.parquet"


def stages(config: ProSettingConfig, round: int) -> Iterable[Stage]:
    """The stages of a round, each after what it needs."""
    pool = StageId(round, "pool")
    if round == 0:
        yield Stage(pool, f"{BODIES}.questions", Kind.SINGLE)
        yield evaluation_stage(config, StageId(0, "evaluate"), f"{BODIES}.evaluate", (pool,))
        return
    shards, questions = config.sample.shards, StageId(round - 1, "pool")
    collect, grade, data = (StageId(round, name) for name in ("collect", "grade", "dpo_data"))
    yield sampling_stage(config, collect, (questions, *_weights(config, round - 1)), shards)
    graded = Stage(grade, f"{BODIES}.grade", Kind.ARRAY, needs=(questions, collect), shards=shards)
    yield from with_service(config, graded, "teacher") if config.grade.asks_teacher else (graded,)
    before = (StageId(round - 1, "dpo_data"),) if config.data_window == "all" and round > 1 else ()
    yield Stage(data, f"{BODIES}.dpo_data", Kind.SINGLE, needs=(questions, grade, *before))
    if _last_trained(config, round) == round:
        yield from _training(config, round)
    if config.generator is not None:
        trained = StageId(round, "train_generator")
        last = (StageId(round - 1, "train_generator"),) if round > 1 else ()
        settings = config.generator_training
        yield training_stage(trained, (data, *last), settings, "generator_training", optional=True)
    enhance = Stage(StageId(round, "enhance"), f"{BODIES}.enhance", Kind.ARRAY, needs=(questions, grade), shards=shards)
    yield from with_service(config, enhance, config.enhance.teacher)
    yield Stage(pool, f"{BODIES}.pool", Kind.SINGLE, needs=(questions, grade, enhance.id))


def sampling(config: ProSettingConfig, stage: StageId) -> SampleTask:
    """Attempts at the round's questions."""
    source = "hpc_rl.sampling.solver:source"
    return SampleTask(_solver(config), _last_trained(config, stage.round - 1), config.sample, source)


def training(config: ProSettingConfig, stage: StageId) -> TrainTask:
    """DPO of the solver on pairs, or RLOO on its graded attempts; of the generator, weighted SFT."""
    data = StageId(stage.round, "dpo_data")
    if stage.name == "train_generator":
        assert config.generator is not None
        return TrainTask(
            algorithm="weighted_sft",
            settings=config.generator_training,
            section="generator_training",
            role=Role("generator", config.generator, stage.name),
            trained_round=stage.round - 1,
            data=Data(data, GENERATOR),
            nothing_to_learn="keep",
        )
    on_policy = config.backend == "rloo"
    return TrainTask(
        algorithm=config.backend,
        settings=config.training,
        section=config.backend,
        role=_solver(config),
        trained_round=_last_trained(config, stage.round - 1),
        data=Data(StageId(stage.round, "grade"), "graded.parquet") if on_policy else Data(data, PAIRS),
        validation=None if on_policy else VALIDATION,
        nothing_to_learn="keep",
        reference=reference.output(stage.round) if config.training.reference_stage else None,
        sampling=config.sample,
        rewards={"correctness": 1.0},
    )


def _training(config: ProSettingConfig, round: int) -> Iterable[Stage]:
    """The solver's training and its evaluation, with a stage for the reference's log-probabilities where asked for."""
    train, weights = StageId(round, "train"), _weights(config, round - 1)
    data = StageId(round, "grade" if config.backend == "rloo" else "dpo_data")
    needs = (data, *weights)
    if config.training.reference_stage:
        shards, settings = config.sample.shards, config.training
        yield reference.stage(data, *weights, shards=shards, settings=settings, section=config.backend, optional=True)
        needs = (*needs, StageId(round, reference.NAME))
    yield training_stage(train, needs, config.training, config.backend, optional=True)
    yield evaluation_stage(config, StageId(round, "evaluate"), f"{BODIES}.evaluate", (StageId(0, "pool"), train))


def _solver(config: ProSettingConfig) -> Role:
    return Role("solver", config.solver)


def _last_trained(config: ProSettingConfig, round: int) -> int:
    """The last round up to this one that trains the solver; 0 where none does (S7, S8)."""
    return round if round >= config.train_start_round else 0


def _weights(config: ProSettingConfig, round: int) -> tuple[StageId, ...]:
    """The stage that left the solver as it is after a round, if one did."""
    return (StageId(last, "train"),) if (last := _last_trained(config, round)) else ()
