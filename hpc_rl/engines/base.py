"""What every engine does: prompts in, sampled token ids with their log-probabilities out.

Two promises hold for all of them. A completion depends on its prompt, its own seed and the weights, and not on which
requests came before (`Engine.forget`) or which random numbers others drew. And `logprobs` are those of the distribution
that was sampled from: after the temperature and after control tokens were banned, so they are what an importance ratio
needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

BAN_BIAS = -100.0
"""Added to the logits of banned tokens. Both engines use this value, which is the largest that vLLM takes."""


@dataclass(frozen=True)
class Prompt:
    """Chat messages with their images.

    Attributes
    ----------
    messages
        As chat templates take them: `{"role": …, "content": [{"type": "image"}, {"type": "text", "text": …}]}`.
    images
        The images, in the order of their places in the messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image, ...] = ()

    @classmethod
    def of(cls, text: str, *images: Image.Image) -> Prompt:
        """One user message: the images, then the text."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return cls(({"role": "user", "content": content},), images)


@dataclass(frozen=True)
class Request:
    """One completion to sample. `seed` is its own: requests that share a prompt differ in nothing else."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes
    ----------
    temperature
        0 is greedy; its log-probabilities are those at temperature 1.
    max_tokens
        Longest completion.
    top_p
        Only the likeliest tokens that together have this probability. 1 for samples that train: the others have none.
    json_schema
        The completion is JSON that follows this schema, itself JSON. Engines that cannot do it say so (ValueError).
    """

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    json_schema: str | None = None


@dataclass(frozen=True)
class Completion:
    """What was sampled.

    Attributes
    ----------
    prompt_token_ids
        The prompt as the model read it, each image's tokens written out.
    token_ids
        Sampled tokens, the end-of-text token included where one was sampled.
    logprobs
        Natural logarithm of the probability with which each of them was sampled.
    text
        Their text without control tokens.
    finish_reason
        `length`: cut off at `max_tokens`.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """A model that samples."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""

    def forget(self) -> None:
        """Drop everything that earlier requests left behind (prefix and image caches); before each shard."""


def end_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: those of the generation config, and the tokenizer's own."""
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    if (Path(folder) / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        ids |= {named} if isinstance(named, int) else set(named or ())
    return tuple(sorted(token for token in ids if token is not None))


def banned_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Control tokens that must not be sampled (L26): all special ones but those that end a completion.

    A sampled `<|image_pad|>` or `<|vision_start|>` would stand for an image that is not there, and the training forward
    pass would stop with "image features and image tokens do not match".
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(special - set(end_ids(folder, tokenizer))))


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of sampled tokens, without control tokens, each character as it was sampled."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def render(processor: Any, prompt: Prompt) -> str:
    """A prompt through the model's chat template, ready for the completion."""
    text: str = processor.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    return text
