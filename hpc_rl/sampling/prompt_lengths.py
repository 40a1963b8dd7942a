"""How many tokens a prompt has: at most, which is cheap, and exactly, for those where it matters.

Most prompts are far from every limit. To see that takes no tokenizer: a token stands for one byte at least, and the
chat template adds the same to all prompts of one form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpc_rl.engines.base import NO_VARIABLES, Prompt, render
from hpc_rl.engines.chat import check_text
from hpc_rl.engines.loading import ModelFolderError, check_variables, control_tokens, load_processor, tokenizer_of
from hpc_rl.sampling.picture_tokens import PictureTokens

NFC_GROWTH = 3
"""Normalization to NFC makes no text longer than this, in bytes of UTF-8 (unicode.org, FAQ Normalization)."""

_PROBE = 100  # characters by which two renderings of a form differ


class PromptReader:
    """Reads prompts as a model would, before there is an engine.

    Parameters
    ----------
    path
        Model folder.
    min_pixels, max_pixels
        The config's pixel limits; without any the model sees no images.
    variables
        Of its chat template (`chat_template_kwargs`).

    Raises
    ------
    ModelFolderError
        When the folder has no chat template, or one that reads no such variable.
    """

    def __init__(
        self,
        path: str,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> None:
        self._path, self._variables = path, variables
        self._processor: Any = load_processor(path, min_pixels, max_pixels)
        self.tokenizer: Any = tokenizer_of(self._processor)
        if self._processor.chat_template is None:
            raise ModelFolderError(f"{path} has no chat template (chat_template.jinja), so it cannot read messages")
        check_variables(self._processor, variables)
        self.control = control_tokens(self.tokenizer)
        self._pictures = PictureTokens(self._processor)
        self._growth = _bytes_per_byte(self.tokenizer)
        self._forms: dict[str, tuple[int, int] | ValueError] = {}

    def at_most(self, prompt: Prompt) -> float:
        """Tokens that a prompt has at most; inf where only `exactly` tells.

        It takes the template for one that writes texts as they are, and no pictures are opened.

        Raises
        ------
        ValueError
            For a prompt that the model cannot read: control tokens in its texts (L26), messages that the chat template
            does not take, more or fewer images than places for them.
        """
        texts = list(_texts(prompt.messages))
        for name, text in texts:
            check_text(name, text, self.control, len(text))  # a text is never longer than its own length in tokens
        self._check_images(prompt)
        fixed, repeats = self._form(prompt.messages)
        if self._growth is None:
            return math.inf
        most = self._pictures.most * len(prompt.images) if prompt.images else 0
        return most + fixed + repeats * sum(_bytes(text, self._growth) for _, text in texts)

    def exactly(self, prompts: Sequence[Prompt]) -> list[int | ValueError]:
        """Tokens of prompts that `at_most` took; for one whose pictures cannot be read, why."""
        rendered = [render(self._processor, prompt, self._variables) for prompt in prompts]
        ids = self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        lengths: list[int | ValueError] = []
        for prompt, text, words in zip(prompts, rendered, ids, strict=True):
            try:
                lengths.append(self._pictures.length(prompt, text, len(words)) if prompt.images else len(words))
            except ValueError as error:
                lengths.append(error)
        return lengths

    def _check_images(self, prompt: Prompt) -> None:
        places = sum(
            part.get("type") == "image"
            for message in prompt.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        if places != len(prompt.images):
            raise ValueError(f"it has {len(prompt.images)} images and {places} places for images in its messages")
        if places and self._processor is self.tokenizer:
            raise ValueError(f"it has images, but {self._path} is read without them: set min_pixels and max_pixels")

    def _form(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """What the template makes of messages like these: bytes of its own, and how often it writes a text at most."""
        form = repr(_filled(messages, ""))
        if form not in self._forms:
            try:
                self._forms[form] = self._read_form(messages)
            except ValueError as error:
                self._forms[form] = error
        found = self._forms[form]
        if isinstance(found, ValueError):
            raise found
        return found

    def _read_form(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        lengths = []
        for words in ("x", "x" * (1 + _PROBE)):
            try:
                rendered = render(self._processor, Prompt(tuple(_filled(messages, words))), self._variables)
            except Exception as error:  # templates are programs, and raise what they like
                raise ValueError(f"the chat template does not take these messages: {error}") from error
            for token in self.control:
                rendered = rendered.replace(token, "x")  # one token, whatever is around it
            lengths.append(_bytes(rendered, self._growth or 1))
        texts = len(list(_texts(messages)))
        return lengths[0], max(1, math.ceil((lengths[1] - lengths[0]) / (_PROBE * max(1, texts))))


def longest_text(prompt: Prompt) -> int:
    """Characters of a prompt's longest text."""
    return max((len(text) for _, text in _texts(prompt.messages)), default=0)


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each text of the messages, and what to call it."""
    for number, message in enumerate(messages):
        content = message["content"]
        for text in (content,) if isinstance(content, str) else (part["text"] for part in content if "text" in part):
            yield f"content of message {number}", text


def _filled(messages: Sequence[Mapping[str, Any]], words: str) -> list[dict[str, Any]]:
    """The messages with these words as each of their texts."""
    filled = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{**part, "text": words} if "text" in part else dict(part) for part in content]
        filled.append({**message, "content": words if isinstance(content, str) else content})
    return filled


def _bytes(text: str, growth: int) -> int:
    return len(text) if text.isascii() else growth * len(text.encode())


def _bytes_per_byte(tokenizer: Any) -> int | None:
    """How many bytes a byte-level tokenizer makes of one before it makes tokens of them; None for other tokenizers.

    Byte-level BPE (GPT-2, Llama 3, Qwen, …) has no token without a byte. Others may write spaces of their own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or backend.pre_tokenizer is None:
        return None
    whole = json.loads(backend.pre_tokenizer.__getstate__())
    steps = whole.get("pretokenizers", [whole])
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    others = [step for step in steps if step["type"] not in ("ByteLevel", "Split", "Digits")]
    if not levels or others or any(step["add_prefix_space"] for step in levels):
        return None
    if backend.normalizer is None:
        return 1
    return NFC_GROWTH if json.loads(backend.normalizer.__getstate__())["type"] == "NFC" else None
