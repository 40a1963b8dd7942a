"""What a chat model can be asked: texts without control tokens that fit into its context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig

from hpc_rl.engines.base import Prompt, render
from hpc_rl.engines.loading import ModelFolderError, control_tokens, load_processor

CHARACTERS_PER_TOKEN = 32
"""No text has more. What does is not tokenised at all: that takes 1.5 s a megabyte."""


class ChatReader:
    """Reads messages as a model would, before it is asked.

    Parameters
    ----------
    path
        Model folder.
    max_model_len
        Longest prompt and completion together, in tokens; None = the model's own limit.

    Raises
    ------
    ModelFolderError
        When the folder has no chat template, or does not say how long its inputs may be.
    """

    def __init__(self, path: str, max_model_len: int | None = None) -> None:
        self._tokenizer: Any = load_processor(path)
        if self._tokenizer.chat_template is None:
            raise ModelFolderError(f"{path} has no chat template (chat_template.jinja), so it cannot read messages")
        self._control = control_tokens(self._tokenizer)
        self.max_tokens = longest_input(path, max_model_len)

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a prompt; ValueError for messages that the model cannot read."""
        for number, message in enumerate(messages):
            check_text(f"content of message {number}", message["content"], self._control, self.max_tokens)
        try:
            text = render(self._tokenizer, Prompt(tuple(messages)))
        except Exception as error:  # templates are programs, and raise what they like
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_text(name: str, text: str, control: Sequence[str], max_tokens: int) -> None:
    """Refuse what would hold up or stop the others in a batch, and control tokens: they would end a message, and start
    another one in the name of somebody else. ValueError."""
    limit = CHARACTERS_PER_TOKEN * max_tokens
    if len(text) > limit:
        raise ValueError(f"the {name} is {len(text)} characters long; at most {limit}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is no text: {error.reason} at character {error.start}") from None
    for token in control:
        if token in text:
            raise ValueError(f"the {name} holds the control token {token}")


def longest_input(path: str, wanted: int | None) -> int:
    """`max_model_len` with its default resolved: the model's positions."""
    config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is None and limit is None:
        raise ModelFolderError(f"{path} names no max_position_embeddings: set max_model_len")
    if wanted is not None and limit is not None and wanted > limit:
        raise ModelFolderError(f"max_model_len is {wanted}, but {path} has {limit} positions")
    return wanted or limit or 0
