"""What every engine does: requests in at any time, sampled token ids with their log-probabilities out as they finish.

    engine.submit(key, request, sampling)      as often as one likes, also while others are at work
    for key, completion in engine.step(): …    what has finished since, in order of completion

Two promises hold for all of them. A completion is drawn with its request's own random numbers: `Request.seed` is all
that they come from. And `logprobs` are those of the distribution that was sampled from: after the temperature and after
control tokens were banned, so they are what an importance ratio needs.

Which requests share a forward pass depends on when each came and how long the others run, and so does the last bit of a
logit: now and then another token is drawn for it. vLLM promises none in its batch-invariant mode (GPUs from H100 on);
`benchmarks/reproducibility.py` measures how many there are without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from hpc_rl.data.images import load_image

BAN_BIAS = -100.0
"""Added to the logits of banned tokens. Both engines use this value, which is the largest that vLLM takes."""

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
"""What most chat templates take besides messages."""


class EngineFailed(RuntimeError):
    """The engine gave up a request that it had accepted; it is not to be used any more."""


@dataclass(frozen=True)
class Prompt:
    """Chat messages with their images.

    Attributes
    ----------
    messages
        As chat templates take them: `{"role": …, "content": [{"type": "image"}, {"type": "text", "text": …}]}`.
    images
        The images, in the order of their places in the messages. Those that are given as files are opened when the
        request is submitted, so that what waits for its turn, or goes to another process, is small.
    keep_tokens
        Only the last so many tokens of the rendered prompt are read; texts only. None = all.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image | Path, ...] = ()
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.keep_tokens is not None and (self.images or self.keep_tokens < 1):
            raise ValueError(
                f"keep_tokens is {self.keep_tokens}, with {len(self.images)} images: at least one token is kept, and "
                "no image is cut in two"
            )

    @classmethod
    def of(cls, text: str, *images: Image.Image | Path) -> Prompt:
        """One user message: the images, then the text."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return cls(({"role": "user", "content": content},), images)

    def open_images(self) -> list[Image.Image]:
        """Its images, decoded; UnreadableImage (a ValueError) for a file that is none."""
        return [load_image(image) if isinstance(image, Path) else image for image in self.images]


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
    stop
        Texts that end a completion. The one that ended it is the end of its text; its tokens are there to the last.

    Raises
    ------
    ValueError
        For numbers that no distribution has, and for an empty stop.
    """

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    json_schema: str | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"the temperature is {self.temperature}; 0 is greedy, 1 the model's own distribution")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; a completion has at least one token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is above 0, and 1 leaves no token out")
        if not all(self.stop):
            raise ValueError("a stop is empty, and would end every completion before it begins: leave it out")


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
        Their text without control tokens; where a stop ended it, up to the stop's last character.
    finish_reason
        `length`: cut off at `max_tokens`, or where the model's longest input ends.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """A model that samples. Not for several threads at once."""

    @property
    def capacity(self) -> int:
        """Completions that it samples at once; with fewer in flight it is not busy."""

    @property
    def unfinished(self) -> int:
        """Requests that were submitted, and neither returned nor aborted."""

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """These come next: begin to read them, with their images, beside the loop.

        Returns
        -------
        int
            How many of the first of them to submit before the next step. For the others `submit` would keep the batch
            waiting.
        """

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """Take one more request; reads the prompt and its images where that was not done before, and samples nothing.

        Raises
        ------
        ValueError
            For what the engine cannot do: a prompt that is too long, an image that cannot be read, a schema. Also for
            a key that is in flight. The requests before it are not touched.
        """

    def step(self) -> list[tuple[str, Completion]]:
        """Work on what was submitted, for a token or for a batch; what has finished since, in order of completion.

        Often that is nothing. Returns at once when nothing is unfinished.

        Raises
        ------
        EngineFailed
            When a request will never finish.
        """

    def abort(self, keys: Collection[str]) -> None:
        """Drop these requests; they are not returned any more. Keys that are not in flight are none of its business."""

    def close(self) -> None:
        """Drop everything, and give back what can be given back; memory of a GPU often only when the process ends."""


@runtime_checkable
class LongSteps(Protocol):
    """An engine whose step may take as long as a whole batch, and that can say meanwhile that it gets on."""

    def tell_progress(self, call: Callable[[], None]) -> None:
        """Have `call` called now and then while a step gets on, by the thread that steps."""


def generate(engine: Engine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    """One completion per request, in order, from an engine that has nothing else to do.

    Raises
    ------
    ValueError
        For the first request that the engine refuses; then none is sampled.
    """
    made = generate_each(engine, [(request, sampling) for request in requests], all_or_none=True)
    return [one for one in made if isinstance(one, Completion)]


def generate_each(
    engine: Engine, asked: Sequence[tuple[Request, Sampling]], *, all_or_none: bool = False
) -> list[Completion | ValueError]:
    """For each request its completion, or why the engine refused it; in order. `all_or_none`: refusals are raised."""
    assert not engine.unfinished, "completions of requests that others have submitted would be lost"
    found: dict[str, Completion | ValueError] = {}
    keys = [str(place) for place in range(len(asked))]
    try:
        for key, (request, sampling) in zip(keys, asked, strict=True):
            try:
                engine.submit(key, request, sampling)
            except ValueError as error:
                if all_or_none:
                    raise
                found[key] = error
        while engine.unfinished:
            found.update(engine.step())
    finally:
        engine.abort(keys)
    return [found[key] for key in keys]


def end_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: those of the generation config, and the tokenizer's own.

    Raises
    ------
    ValueError
        When there are none: every completion would be as long as it may be.
    """
    from transformers import GenerationConfig

    ids = {tokenizer.eos_token_id}
    if (Path(folder) / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        ids |= {named} if isinstance(named, int) else set(named or ())
    ends = tuple(sorted(token for token in ids if token is not None))
    if not ends:
        raise ValueError(
            f"{folder} names no token that ends a completion, so each would run to max_tokens: set eos_token_id in its "
            "generation_config.json, or eos_token in its tokenizer_config.json"
        )
    return ends


def banned_ids(folder: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Control tokens that must not be sampled (L26): all special ones but those that end a completion.

    A sampled `<|image_pad|>` or `<|vision_start|>` would stand for an image that is not there, and the training forward
    pass would stop with "image features and image tokens do not match".
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(special - set(end_ids(folder, tokenizer))))


def too_long(tokens: int, max_model_len: int) -> str:
    """What an engine says about a prompt that leaves no room for a completion."""
    return (
        f"the prompt has {tokens} tokens; the engine takes {max_model_len}, of which at least one is the completion's: "
        "shorten it, or raise max_model_len"
    )


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of sampled tokens, without control tokens, each character as it was sampled."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def render(processor: Any, prompt: Prompt, variables: Mapping[str, Any] = NO_VARIABLES) -> str:
    """A prompt through the model's chat template, with its variables, ready for the completion."""
    text: str = processor.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, tokenize=False, **variables
    )
    return text
