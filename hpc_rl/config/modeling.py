"""The models of a config: where they lie, how they are loaded, how LoRA is put on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import Fault, FreeMapping, ModelPath, PositiveFloat, PositiveInt, Section

LISTENER_QUESTION = (
    'Does this description "{coarse}. {detailed}" accurately describe the main subject in the image? Answer yes or no.'
)
"""L3."""
OWN_ARGUMENTS = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
    "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
"""Arguments of transformers' apply_chat_template that are no variables of a template, or are the code's to set."""


class LoraConfig(Section):
    """Low-rank adapters. L17: 2B and 7B models r 64, alpha 128; 14B and more r 128, alpha 256; dropout 0.001."""

    r: PositiveInt = 64
    """Rank. LORA_RANK sets it."""
    alpha: PositiveFloat = 128
    """Scale: the adapter's output counts alpha / r. LORA_ALPHA sets it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Dropout on the adapter's input while training."""
    target_modules: str | tuple[str, ...] = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    """Modules that get an adapter: a regular expression that the whole name must match, or a list of name endings."""


class ModelConfig(Section):
    """A language model in a Hugging Face folder."""

    path: ModelPath
    """Model folder (config.json, safetensors, tokenizer, processor). Nothing is downloaded."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number type of weights and activations."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention code. auto: flash_attention_2 where it is installed, else sdpa, and the log says which (L19)."""
    chat_template_kwargs: FreeMapping = Field(default_factory=dict)
    """Variables of its chat template, the same in every phase: `{enable_thinking: false}` of Qwen3."""

    def faults(self) -> Iterator[Fault]:
        """Variables of the template that no template can read, or that every phase sets by itself."""
        yield from super().faults()
        for name in self.chat_template_kwargs:
            if name in OWN_ARGUMENTS or not name.isidentifier():
                what = "every phase sets this by itself" if name in OWN_ARGUMENTS else "no name of a variable"
                expected = "a variable that the model's chat template reads"
                yield Fault(("chat_template_kwargs", name), what, expected, "remove it here")

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """Fewest and most pixels of an image; None of a model that sees none."""
        return None, None


class TrainedModelConfig(ModelConfig):
    """A language model that is trained."""

    lora: LoraConfig | None = None
    """Train adapters (L17), or null to train all weights."""


class VisionModelConfig(ModelConfig):
    """A vision-language model in a Hugging Face folder."""

    min_pixels: PositiveInt = 3136
    """Smaller images are scaled up to this many pixels; the same in every phase (L19)."""
    max_pixels: PositiveInt = 401408
    """Larger images are scaled down to this many pixels; the same in every phase (L19)."""

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """See `ModelConfig.pixels`."""
        return self.min_pixels, self.max_pixels

    def faults(self) -> Iterator[Fault]:
        """Pixel limits that exclude each other."""
        yield from super().faults()
        if self.min_pixels > self.max_pixels:
            yield Fault(("min_pixels",), f"{self.min_pixels} is above max_pixels", f"at most {self.max_pixels}")


class SpeakerConfig(VisionModelConfig, TrainedModelConfig):
    """The model that describes the target image; the one that is trained."""

    freeze_vision: bool = True
    """Leave the vision tower as it is."""


class ListenerConfig(VisionModelConfig):
    """The model that picks the target among the candidates; frozen and served."""

    question: str = LISTENER_QUESTION
    """What it is asked about each candidate (L3); `{coarse}` and `{detailed}` are the parts of the description."""

    def faults(self) -> Iterator[Fault]:
        """A question that cannot be filled in, or that would not show the listener the description."""
        yield from super().faults()
        expected = "a text with {coarse} and {detailed}; other braces doubled"
        try:
            text = self.question.format(coarse="\0", detailed="\1")
        except (KeyError, IndexError, ValueError) as error:
            yield Fault(("question",), f"{self.question!r} cannot be filled in ({error!r})", expected)
            return
        if "\0" not in text and "\1" not in text:
            yield Fault(("question",), f"{self.question!r} does not show the listener the description", expected)
