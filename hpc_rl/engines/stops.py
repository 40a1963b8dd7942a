"""Stops in the transformers engine, found as vLLM finds them: both engines end a completion at the same token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import StoppingCriteria


class Stops(StoppingCriteria):  # type: ignore[misc]
    """Reads a batch along as it is written, token by token, and ends the rows in which a stop is complete.

    Parameters
    ----------
    tokenizer
        A fast one; `can_read` tells.
    prompts
        Each row's prompt: a token may be spelt otherwise at the beginning of a text.
    stops
        The texts to look for.
    ends
        Tokens that end a completion: what follows them in a row is padding.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Sequence[str], ends: Sequence[int]):
        self._decoder, self._stops, self._ends = tokenizer.backend_tokenizer, stops, frozenset(ends)
        self._streams = [DecodeStream(ids=list(prompt), skip_special_tokens=True) for prompt in prompts]
        self._over = [False] * len(prompts)
        self._written = 0
        self.texts = [""] * len(prompts)
        """Of each row so far, up to the end of the stop where it has one."""
        self.lengths: list[int | None] = [None] * len(prompts)
        """Tokens up to the one that completed the stop."""

    @staticmethod
    def can_read(tokenizer: Any) -> bool:
        """Whether the tokenizer can be read along."""
        return hasattr(tokenizer, "backend_tokenizer")

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._written += 1
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._over[row]:
                self._read(row, token)
        return torch.tensor(self._over, device=input_ids.device)

    def _read(self, row: int, token: int) -> None:
        new = self._streams[row].step(self._decoder, token) or ""
        text = self.texts[row] + new
        end = first_stop(text, len(new), self._stops)
        self.texts[row] = text if end is None else text[:end]
        if end is not None:
            self.lengths[row] = self._written
        self._over[row] = end is not None or token in self._ends


def first_stop(text: str, new: int, stops: Sequence[str]) -> int | None:
    """Where the stop that is complete first ends, of those that end in the last `new` characters; None: none does."""
    if not new:
        return None
    places = ((text.find(stop, max(0, len(text) - new - len(stop) + 1)), len(stop)) for stop in stops)
    return min((place + length for place, length in places if place >= 0), default=None)
