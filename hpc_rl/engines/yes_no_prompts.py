"""Yes/no questions about an image as token ids: the prompt, what cannot be asked, and how yes and no are spelt (L2)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_rl.engines.base import NO_VARIABLES, Prompt, render
from hpc_rl.engines.loading import ModelFolderError, control_tokens

log = logging.getLogger(__name__)

_HERE = "\x00question\x00"


@dataclass(frozen=True)
class Unscorable:
    """Why a question about an image has no P(yes)."""

    reason: str


def surface_forms(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of all single tokens that spell `word`, whatever their case and the white space around it.

    Raises
    ------
    ModelFolderError
        When there is none: then P(yes) cannot be read off one token.
    """
    control = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in control]
    texts = tokenizer.batch_decode([[index] for index in ids], clean_up_tokenization_spaces=False)
    forms = tuple(index for index, text in zip(ids, texts, strict=True) if text.strip().lower() == word)
    if not forms:
        raise ModelFolderError(f"no token of {tokenizer.name_or_path} spells {word!r}: this model cannot be a listener")
    return forms


class YesNoPrompts:
    """Makes the prompts of one model: the image first, the question after, so that questions share what comes before.

    Parameters
    ----------
    processor
        Tokenizer, chat template, image processor.
    max_tokens
        Longest prompt, the image's tokens included.
    variables
        Of its chat template (`chat_template_kwargs`).
    """

    def __init__(self, processor: Any, max_tokens: int, variables: Mapping[str, Any] = NO_VARIABLES) -> None:
        self._tokenizer, self._max_tokens = processor.tokenizer, max_tokens
        self._control = control_tokens(processor)
        content = [{"type": "image"}, {"type": "text", "text": _HERE}]
        prompt = render(processor, Prompt(({"role": "user", "content": content},)), variables)
        self._head, _, self._tail = prompt.partition(_HERE)
        self.image_id: int = self._tokenizer.convert_tokens_to_ids(processor.image_token)
        self.yes_ids = surface_forms(self._tokenizer, "yes")
        self.no_ids = surface_forms(self._tokenizer, "no")
        log.info("yes is spelt by tokens %s, no by %s", self.yes_ids, self.no_ids)
        self._lock = threading.Lock()
        self.tokens_made = 0
        """Of all prompts so far, each image's tokens included."""

    def rows(self, asked: Sequence[tuple[int, str]]) -> list[list[int] | Unscorable]:
        """Token ids of each prompt, with one image token that stands for all of the image's, or why there are none.

        Parameters
        ----------
        asked
            For each prompt the number of its image's tokens, and the question.
        """
        if not asked:
            return []
        texts = [self._head + question + self._tail for _, question in asked]
        rows: list[list[int] | Unscorable] = []
        made = 0
        for (image_tokens, question), row in zip(
            asked, self._tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
        ):
            length = len(row) - 1 + image_tokens
            found = next((token for token in self._control if token in question), None)
            if found is not None:
                rows.append(Unscorable(f"the question holds the control token {found}"))
            elif length > self._max_tokens:
                rows.append(Unscorable(f"image and question have {length} tokens, the model takes {self._max_tokens}"))
            else:
                rows.append(row)
                made += length
        with self._lock:
            self.tokens_made += made
        return rows
