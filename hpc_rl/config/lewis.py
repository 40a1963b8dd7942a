"""The config of the Lewis game (systems.md L1–L27): its data, its rewards, and the whole tree."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpc_rl.config.base import Fault, FilePath, Fraction, ModelPath, NonNegativeFloat, PositiveInt, Section
from hpc_rl.config.errors import Problem
from hpc_rl.config.modeling import ListenerConfig, SpeakerConfig
from hpc_rl.config.phases import EvaluateConfig, SampleConfig
from hpc_rl.config.sampling_recipe import SamplingRecipeConfig
from hpc_rl.config.training import GrpoTrainConfig

SPEAKER_PROBLEM = (
    "Describe the main subject of this image so that it can be told apart from similar ones. "
    "First think about what makes it unlike others of its kind, in <thinking></thinking>. "
    'Then give a short category-level description in <coarse></coarse>, such as "A photo of a dog". '
    "Then give its distinguishing features in exactly one sentence in <detailed></detailed>. "
    "Do not mention the background, the place or the pose."
)


class ScenesConfig(Section):
    """Images that the `prepare` stage renders by itself, in the layout of real photos."""

    views_train: PositiveInt = 6
    """Views of each concept in the `train` folder."""
    views_test: PositiveInt = 3
    """Views of each concept in the `test` folder; never trained on."""
    size: Annotated[int, Field(ge=28)] = 56
    """Width and height of an image, in pixels."""


class EmbeddingConfig(Section):
    """What measures how alike two concepts are, to find hard negatives (L20)."""

    path: ModelPath | None = None
    """Model folder. null = the speaker's."""


class EvalRowsConfig(Section):
    """Games of each evaluation set."""

    new_views: PositiveInt = 504
    """Games on training concepts, images never trained on."""
    validation: PositiveInt = 504
    """Games on held-out concepts."""


class DataConfig(Section):
    """The games (L20): each has a target image and K candidates, one of them another view of the same concept."""

    image_root: FilePath | None = None
    """Folder of images `<split>/<category>/<concept>/*`, splits `train` and, where there is one, `test`."""
    scenes: ScenesConfig | None = None
    """Render images instead of reading `image_root`."""
    k: Annotated[int, Field(ge=2, le=26)] = 3
    """Candidates (K) of a game: one other view of the target's concept and K − 1 other concepts."""
    validation_fraction: Fraction = 0.2
    """Share of each category's concepts that is held out for validation."""
    split_seed: int = 7
    """Seed of that split."""
    negatives_from: PositiveInt | None = None
    """Draw the K − 1 others from this many nearest concepts. null = always the K − 1 nearest."""
    embedding: EmbeddingConfig = EmbeddingConfig.model_construct()
    """What "nearest" means."""
    train_rows: PositiveInt = 1024
    """Games to train on."""
    eval_rows: EvalRowsConfig = EvalRowsConfig.model_construct()
    """Games to evaluate on."""
    new_views_per_concept: PositiveInt = 2
    """Images of each training concept that are kept from training, where there is no `test` split."""
    categories: tuple[str, ...] | None = None
    """Categories to use. null = all that are there, resolved when the run is launched."""
    unreadable_image: Literal["error", "skip"] = "error"
    """What an image that cannot be read does: stop, with its name, or be left out and counted."""
    speaker_problem: Annotated[str, Field(min_length=1)] = SPEAKER_PROBLEM
    """What the speaker is asked (L6 has the format of the answer)."""

    def faults(self) -> Iterator[Fault]:
        """No images, or images from two places; fewer negatives than a game needs; a category twice."""
        if (self.image_root is None) == (self.scenes is None):
            what = "neither image_root nor scenes is given" if self.scenes is None else "scenes is given too"
            yield Fault(
                ("image_root",), what, "a folder of images, or scenes to be rendered", "set one, the other null"
            )
        if self.negatives_from is not None and self.negatives_from < self.k - 1:
            yield Fault(
                ("negatives_from",), f"{self.negatives_from} for k = {self.k}", f"at least {self.k - 1}, or null"
            )
        if self.categories is not None:
            twice = sorted({name for name in self.categories if self.categories.count(name) > 1})
            if twice:
                yield Fault(("categories",), f"{', '.join(twice)} is named twice", "each category once")


class AccuracyRewardConfig(Section):
    """Did the listener pick the target (L7)?"""

    weight: NonNegativeFloat = 1.0
    """Its weight in the total (L10)."""
    mode: Literal["argmax", "soft_gated"] = "argmax"
    """argmax: 1 if picked, else 0. soft_gated: P(yes) of the target over the sum, halved where none reaches 0.3."""


class WeightedRewardConfig(Section):
    """A reward with nothing to set but its weight."""

    weight: NonNegativeFloat = 1.0
    """Its weight in the total (L10)."""


class RewardsConfig(Section):
    """The parts of the reward; total = Σ weight · part (L10), each part is logged by itself."""

    accuracy: AccuracyRewardConfig = AccuracyRewardConfig.model_construct()
    """1 if the listener picks the target (L7)."""
    format: WeightedRewardConfig = WeightedRewardConfig.model_construct()
    """1 if all three tags are there, closed, in order, once each (L8)."""
    length: WeightedRewardConfig = WeightedRewardConfig.model_construct()
    """0.1 if `<detailed>` is exactly one sentence (L9)."""

    def faults(self) -> Iterator[Fault]:
        """Nothing to learn from."""
        if not (self.accuracy.weight or self.format.weight or self.length.weight):
            yield Fault((), "all weights are 0, so there is nothing to learn", "at least one weight above 0")


class LewisConfig(SamplingRecipeConfig):
    """The whole tree of `configs/lewis.yaml`."""

    stage_names: ClassVar[tuple[str, ...] | None] = (
        "prepare", "dataset", "sample", "grade", "reference", "train", "evaluate", "advance",
        "grade.listener", "train.listener", "evaluate.listener",
    )  # fmt: skip
    array_stages: ClassVar[frozenset[str] | None] = frozenset({"prepare", "sample", "grade", "reference"})
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {"advance": {"time_min": 15}}
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",)}
    trained_models: ClassVar[Mapping[str, str]] = {"train": "speaker"}
    variables: ClassVar[Mapping[str, str]] = {"LORA_RANK": "speaker.lora.r", "LORA_ALPHA": "speaker.lora.alpha"}

    speaker: SpeakerConfig
    """The model that is trained."""
    listener: ListenerConfig
    """The model that judges."""
    data: DataConfig
    """The games."""
    sample: SampleConfig = SampleConfig.model_construct()
    """Sampling descriptions."""
    rewards: RewardsConfig = RewardsConfig.model_construct()
    """The reward's parts and weights."""
    train: GrpoTrainConfig = GrpoTrainConfig.model_construct()
    """GRPO on the graded descriptions."""
    evaluate: EvaluateConfig = EvaluateConfig.model_construct()
    """Evaluation after each round."""

    @property
    def train_batch_size(self) -> int:
        """Completions per optimizer step over all ranks of the training job."""
        world = self.stages["train"].world_size
        return self.train.per_device_batch_size * self.train.gradient_accumulation_steps * world

    def models_elsewhere(self) -> Collection[str]:
        """The listener where somebody else serves it."""
        return () if self.services.listener.client.url is None else ("listener",)

    def prompts_in(self, round: int, look: bool) -> int | None:
        """As `sample` says."""
        return self.sample.prompts_per_round

    def file_problems(self, rows: bool = True) -> Iterator[Problem]:
        """The images, and the model that measures how alike they are."""
        from hpc_rl.config.check_images import check_images
        from hpc_rl.config.checks import check_model

        if self.data.embedding.path is not None:
            yield from check_model("data.embedding.path", Path(self.data.embedding.path))
        yield from check_images(self.data)

    def faults(self) -> Iterator[Fault]:
        """Training batches that cut a group in two; prompts that cannot be cut.

        The advantage is relative to the group, so a training batch must hold whole groups (TRL checks the same, later).
        """
        yield from super().faults()
        if self.sample.long_prompts == "truncate_left":
            what = "truncate_left, but every prompt of this game has a picture, and those cannot be cut"
            yield Fault(("sample", "long_prompts"), what, "error or drop", "or lower speaker.max_pixels")
        group = self.sample.samples_per_prompt
        if self.train_batch_size % group:
            what = (
                f"a training batch of {self.train_batch_size} completions (train.per_device_batch_size × "
                f"train.gradient_accumulation_steps × ranks of stages.train) cuts groups of {group} in two"
            )
            yield Fault(("train", "gradient_accumulation_steps"), what, f"a batch that is a multiple of {group}")
