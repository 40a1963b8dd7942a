"""The config of progressive solver training (systems.md S1–S19): questions, teachers, training, and the whole tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpc_rl.config.base import (
    Fault,
    FilePath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
)
from hpc_rl.config.errors import Problem
from hpc_rl.config.legacy import PROSETTING, LegacyKey
from hpc_rl.config.modeling import LoraConfig, TrainedModelConfig
from hpc_rl.config.phases import Engine, SamplingConfig
from hpc_rl.config.sampling_recipe import SamplingRecipeConfig
from hpc_rl.config.training import DpoTrainConfig, RlooTrainConfig, WeightedSftTrainConfig

SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."


class TextLoraConfig(LoraConfig):
    """Low-rank adapters of a language model without a vision tower."""

    target_modules: str | tuple[str, ...] = r".*\.(q|k|v|o|gate|up|down)_proj"
    """Modules that get an adapter: a regular expression that the whole name must match, or a list of name endings."""


class SolverConfig(TrainedModelConfig):
    """The model that answers questions; the one that is trained. SOLVER_MODEL_PATH sets its path."""

    lora: TextLoraConfig | None = None
    """Train adapters, or null to train all weights."""


class QuestionsConfig(Section):
    """The questions that the run begins with (S15), and how the solver is asked."""

    file: FilePath
    """JSON list, JSONL or parquet with `question`, `answer` and, where there is one, `solution`; usual other names are
    understood, and a question that comes twice counts once. QUESTIONS_FILE."""
    held_out_file: FilePath | None = None
    """Questions to evaluate on; none of them is ever trained on. null = `held_out_fraction` of `file`."""
    held_out_fraction: Fraction = 0.1
    """Share of `file` that is held out, where no file is named."""
    validation_fraction: Fraction = 0.1
    """Share of the questions whose pairs are for validation (S5). Variants go where the question went that they come
    from."""
    system_prompt: str | None = SYSTEM_PROMPT
    """System message before each question. null = none."""
    prompt: Annotated[str, Field(min_length=1)] = "{question}"
    """What the solver reads; `{question}` is the question."""

    def faults(self) -> Iterator[Fault]:
        """A prompt without the question."""
        if "{question}" not in self.prompt:
            yield Fault(("prompt",), f"{self.prompt!r} does not show the question", "a text with {question}")


class CollectConfig(SamplingConfig):
    """Attempts at each question of the round's pool (S1)."""

    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Attempts at each question (S1)."""
    shards: PositiveInt = 64
    """Into how many pieces a round's questions are cut, whatever their number. A piece is what a lost task costs at
    most; more of them than array tasks."""
    long_prompts: Literal["error", "drop", "truncate_left"] = "drop"
    """What becomes of a prompt that leaves less than `max_tokens` for its completion. drop: leave it out, counted; a
    teacher may write a long question, and that should not end the run. error: stop before the engine starts, with its
    row. truncate_left: cut tokens off its beginning."""


class GradeConfig(Section):
    """How attempts are graded (S2): by rule first; a teacher is asked where the rule cannot say."""

    answers: Literal["math", "text"] = "math"
    """How the rule compares. math: as numbers, expressions, sets … (math-verify). text: the same words, whatever case
    and spacing."""
    judge: Literal["unsure", "not_right", "never"] = "unsure"
    """Which attempts the teacher judges: those that the rule cannot decide, all that it does not call right, or none;
    then those that it cannot decide count as wrong."""
    check_references: bool = True
    """Ask the teacher about the reference answers of questions that no attempt solved (S4). Those that it finds wrong
    are in no pair and leave the pool."""

    @property
    def asks_teacher(self) -> bool:
        """Whether the stage asks `services.teacher` anything."""
        return self.judge != "never" or self.check_references


class PairsConfig(Section):
    """Pairs for DPO (S5)."""

    max_per_question: PositiveInt = 8
    """Most pairs of one question in a round, drawn from all right × wrong ones."""
    reference_solutions: bool = True
    """Where all attempts failed the reference solution is the right one; without it such a question has no pairs."""


class EnhanceConfig(Section):
    """New questions from those that were answered (S3, S4)."""

    teacher: Literal["teacher", "enhancer"] = "teacher"
    """Which of `services` writes them."""
    temperature: NonNegativeFloat = 0.7
    """Its temperature."""
    max_tokens: PositiveInt = 4096
    """Its longest answer, in tokens."""
    failures_shown: NonNegativeInt = 3
    """Wrong attempts that it sees of a question that is still being learned."""


class PoolConfig(Section):
    """The questions of the next round (S9): enhanced ones, all failed ones, and some of the rest."""

    replay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the other questions that come again, at random."""
    max_questions: PositiveInt | None = None
    """Most questions of a round after the first, which has all of the file: replayed ones are left out first, then
    failed ones, then enhanced ones. null = no limit."""


class GeneratorConfig(TrainedModelConfig):
    """A model that learns to write questions which are right half of the time (S17)."""

    lora: TextLoraConfig | None = None
    """Train adapters, or null to train all weights."""


class SolverEvaluateConfig(Section):
    """Held-out questions, before the first and after each training."""

    engine: Engine | None = None
    """What generates. null = `sample.engine`."""
    samples_per_question: PositiveInt = 1
    """Attempts at each question: pass@1 is the mean over all of them (mean@32 with 32)."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy."""
    batch_size: PositiveInt = 1024
    """Attempts handed to the engine at once."""

    def faults(self) -> Iterator[Fault]:
        """The same answer again and again."""
        if self.samples_per_question > 1 and self.temperature == 0:
            what = f"{self.samples_per_question}, but with temperature 0 all attempts are the same"
            yield Fault(("samples_per_question",), what, "1", "or a temperature above 0")


class ProSettingConfig(SamplingRecipeConfig):
    """The whole tree of `configs/prosetting.yaml`."""

    stage_names: ClassVar[tuple[str, ...] | None] = (
        "collect", "grade", "dpo_data", "reference", "train", "train_generator", "enhance", "pool", "evaluate",
        "advance", "grade.teacher", "enhance.teacher", "enhance.enhancer",
    )  # fmt: skip
    array_stages: ClassVar[frozenset[str] | None] = frozenset({"collect", "grade", "reference", "enhance"})
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("dpo", "rloo"), "train_generator": ("generator_training",),
    }  # fmt: skip
    trained_models: ClassVar[Mapping[str, str]] = {"train": "solver", "train_generator": "generator"}
    variables: ClassVar[Mapping[str, str]] = {
        "SOLVER_MODEL_PATH": "solver.path",
        "LORA_RANK": "solver.lora.r",
        "LORA_ALPHA": "solver.lora.alpha",
        "QUESTIONS_FILE": "questions.file",
        "TRL_NUM_PROCESSES": "stages.train.ranks_per_node",
    }
    legacy_keys: ClassVar[Mapping[str, LegacyKey]] = PROSETTING
    sampling_stage: ClassVar[str] = "collect"

    solver: SolverConfig
    """The model that is trained."""
    questions: QuestionsConfig
    """What the run begins with."""
    sample: CollectConfig = CollectConfig.model_construct()
    """Attempts at the questions."""
    grade: GradeConfig = GradeConfig.model_construct()
    """Which attempts are right."""
    pairs: PairsConfig = PairsConfig.model_construct()
    """Pairs for DPO."""
    backend: Literal["dpo", "rloo"] = "dpo"
    """How the solver is trained (S10). dpo: on pairs. rloo: on-policy, on the round's own graded attempts."""
    train_start_round: PositiveInt = 3
    """First round that trains; the ones before only collect data (S7)."""
    data_window: Literal["all", "last"] = "all"
    """DPO's pairs: those of all rounds so far, or of the round alone (S7). RLOO is on-policy: always of the round."""
    dpo: DpoTrainConfig = DpoTrainConfig.model_construct()
    """With `backend: dpo`."""
    rloo: RlooTrainConfig = RlooTrainConfig.model_construct()
    """With `backend: rloo`."""
    enhance: EnhanceConfig = EnhanceConfig.model_construct()
    """New questions."""
    pool: PoolConfig = PoolConfig.model_construct()
    """The next round's questions."""
    generator: GeneratorConfig | None = None
    """A question generator that is trained beside the solver (S17), or null."""
    generator_training: WeightedSftTrainConfig = WeightedSftTrainConfig.model_construct()
    """How it is trained."""
    evaluate: SolverEvaluateConfig = SolverEvaluateConfig.model_construct()
    """Evaluation on held-out questions."""

    @property
    def training(self) -> DpoTrainConfig | RlooTrainConfig:
        """The section of the backend."""
        return self.dpo if self.backend == "dpo" else self.rloo

    @property
    def service_stages(self) -> frozenset[str]:
        """grade has a teacher where one judges or checks references; enhance has the one that writes."""
        graded = ("grade.teacher",) if self.grade.asks_teacher else ()
        return frozenset({*graded, f"enhance.{self.enhance.teacher}"})

    def prompts_in(self, round: int, look: bool) -> int | None:
        """Round 1 has the file's questions. Later ones have at most a variant of each, and what is replayed besides."""
        from hpc_rl.data.question_files import QuestionFileError, iter_rows

        most = self.pool.max_questions
        if not look:
            return most
        try:
            first = sum(1 for _ in iter_rows(self.questions.file))
        except QuestionFileError:  # `file_problems` says why
            return most
        grown = int(first * (1 + self.pool.replay_fraction) ** (round - 1))
        return grown if most is None or round == 1 else min(grown, most)

    def stage_extras(self, name: str) -> tuple[str, ...]:
        """Math answers are compared by a library; teachers are asked by one."""
        compares = self.grade.answers == "math" and name in ("grade", "dpo_data", "enhance", "evaluate")
        asks = any(stage.startswith(f"{name}.") for stage in self.service_stages)
        return (*(("solve",) if compares else ()), *(("teacher",) if asks else ()))

    def file_problems(self, rows: bool = True) -> Iterator[Problem]:
        """Question files that cannot be read, row by row (S15); teachers that are asked and are nowhere.

        Once round 0 has taken the questions over, nobody reads the files any more: the run goes on without them.
        """
        from hpc_rl.data.question_files import check_files, check_there
        from hpc_rl.run import manifest
        from hpc_rl.run.workspace import Workspace

        if not manifest.done_shards(Workspace(self.run.workspace), 0, "pool"):
            yield from check_files(self.questions) if rows else check_there(self.questions)
        for name in sorted({stage.partition(".")[2] for stage in self.service_stages}, reverse=True):
            options = self.services.teacher if name == "teacher" else self.services.enhancer
            if options.client.url is None and options.served_model is None:
                what = "nobody to ask: neither client.url nor model is set"
                by = "TEACHER_BASE_URL, or " if name == "teacher" else ""
                way_out = f"{by}services.{name}.client.url: an OpenAI-compatible endpoint; or services.{name}.model"
                way_out += "; or enhance.teacher: teacher" if name == "enhancer" else ""
                yield Problem(f"services.{name}", what, "an endpoint, or a model to serve", way_out)

    def notes(self) -> Iterator[str]:
        """A solver that is never trained."""
        yield from super().notes()
        if self.train_start_round > self.run.rounds:
            yield (
                f"train_start_round is {self.train_start_round} and run.rounds {self.run.rounds}: "
                "the solver is never trained, data is all that is collected"
            )

    def faults(self) -> Iterator[Fault]:
        """Rollouts that RLOO's trainer would draw by itself; steps that cut a group in two."""
        yield from super().faults()
        if self.rloo.rollouts == "live":
            yield Fault(("rloo", "rollouts"), "live, but the attempts are collected by a stage of their own", "round")
        world, group = self.stages["train"].world_size, self.sample.samples_per_prompt
        batch = self.rloo.per_device_batch_size * self.rloo.gradient_accumulation_steps * world
        if self.backend == "rloo" and batch % group:
            what = f"a training batch of {batch} attempts cuts groups of {group} in two"
            yield Fault(("rloo", "gradient_accumulation_steps"), what, f"a batch that is a multiple of {group}")
