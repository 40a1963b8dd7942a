"""Prompts and stops are checked before the engine starts: whoever made a mistake hears of it in seconds, by row.

A prompt that the model cannot read stops the round: control tokens in its text (L26), messages that its chat template
does not take. So do stops that no completion can hold. A prompt that leaves no room for a completion is treated as
`sample.long_prompts` says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from hpc_rl.engines.base import NO_VARIABLES, Prompt, Sampling

log = logging.getLogger(__name__)

LongPrompts = Literal["error", "drop", "truncate_left"]

NAMED = 5
"""Rows that a message names; of the others it says how many there are."""

READ_AT_ONCE = 64
"""Prompts that are tokenised together."""


class PromptError(ValueError):
    """Prompts or stops that cannot be sampled from; the message names the rows and the ways out."""


@dataclass(frozen=True)
class CheckedPrompts:
    """What the check found.

    Attributes
    ----------
    checked
        How many prompts there were.
    room
        Tokens that a prompt may have: max_model_len − max_tokens.
    long
        Rows with a longer one. A row whose prompt is too long for one role is long for all of them.
    how
        `sample.long_prompts`.
    """

    checked: int
    room: int
    long: frozenset[str]
    how: LongPrompts

    def fit(self, row_id: str, prompt: Prompt) -> Prompt | None:
        """The prompt as it is to be sampled from: itself, cut, or None if its row is dropped."""
        if row_id not in self.long:
            return prompt
        return None if self.how == "drop" else replace(prompt, keep_tokens=self.room)

    @property
    def dropped(self) -> frozenset[str]:
        """Rows that are not sampled."""
        return self.long if self.how == "drop" else frozenset()


@dataclass
class _Rows:
    """Rows with something in common: the first few with what is to be said of them, and how many there are."""

    first: list[str] = field(default_factory=list)
    number: int = 0

    def add(self, row_id: str, what: str) -> None:
        self.number += 1
        if len(self.first) < NAMED:
            self.first.append(f"row {row_id}: {what}")

    def __str__(self) -> str:
        more = [f"and {self.number - NAMED} more"] if self.number > NAMED else []
        return "; ".join([*self.first, *more])


def check_prompts(
    prompts: Iterable[tuple[str, Prompt]],
    folder: str,
    sampling: Sampling,
    *,
    max_model_len: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    how: LongPrompts = "error",
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> CheckedPrompts:
    """Check all prompts of a round.

    Parameters
    ----------
    prompts
        With their rows' ids, those of a row one after the other; read once, and none is kept. Images best as paths:
        most are not opened then, and of others only the header is read.
    folder
        The model's.
    sampling
        Longest completion, and stops.
    max_model_len
        Longest prompt and completion together; None = the model's own limit.
    min_pixels, max_pixels
        The config's pixel limits; without any the model sees no images.
    how
        What becomes of prompts that leave no room for a completion.
    variables
        Of the chat template (`chat_template_kwargs`).

    Raises
    ------
    PromptError
        For all rows at once that cannot be read, or are too long; for a stop that no completion can hold; when there is
        no room for any prompt, or no prompt is left.
    ModelFolderError
        When the folder has no chat template, or one that reads no such variable, or fewer positions than max_model_len.
    """
    from hpc_rl.engines.chat import longest_input
    from hpc_rl.sampling.prompt_lengths import PromptReader

    reader = PromptReader(folder, min_pixels, max_pixels, variables)
    limit = longest_input(folder, max_model_len)
    room = limit - sampling.max_tokens
    if room < 1:
        raise PromptError(
            f"sample.max_tokens = {sampling.max_tokens} leaves no room for a prompt: {folder} takes {limit} tokens, "
            "prompt and completion together. Lower it, or raise sample.max_model_len where the model allows it"
        )
    check_stops(sampling.stop, reader.tokenizer, reader.control)
    check = _Check(reader, limit, room, how)
    left = iter(prompts)
    while part := list(islice(left, READ_AT_ONCE)):
        check.look_at(part)
    return check.result()


class _Check:
    """Collects what is wrong with prompts, so that it can be said at once."""

    def __init__(self, reader: Any, limit: int, room: int, how: LongPrompts) -> None:
        self._reader, self._limit, self._room, self._how = reader, limit, room, how
        self._checked = self._rows = 0
        self._last: str | None = None
        self._unreadable, self._too_long, self._uncuttable = _Rows(), _Rows(), _Rows()
        self._long: set[str] = set()

    def look_at(self, prompts: Sequence[tuple[str, Prompt]]) -> None:
        from hpc_rl.engines.chat import CHARACTERS_PER_TOKEN
        from hpc_rl.sampling.prompt_lengths import longest_text

        doubtful = []
        for row_id, prompt in prompts:
            self._checked += 1
            self._rows += row_id != self._last
            self._last = row_id
            try:
                most = self._reader.at_most(prompt)
            except ValueError as error:
                self._unreadable.add(row_id, str(error))
                continue
            if most <= self._room:
                continue
            characters = longest_text(prompt)
            if characters > CHARACTERS_PER_TOKEN * self._limit:  # tokenising it would take long
                self._is_long(row_id, prompt, f"a text of {characters} characters")
            else:
                doubtful.append((row_id, prompt))
        lengths = self._reader.exactly([prompt for _, prompt in doubtful]) if doubtful else []
        for (row_id, prompt), length in zip(doubtful, lengths, strict=True):
            if isinstance(length, ValueError):
                self._unreadable.add(row_id, str(length))
            elif length > self._room:
                self._is_long(row_id, prompt, f"{length} tokens")

    def _is_long(self, row_id: str, prompt: Prompt, length: str) -> None:
        self._long.add(row_id)
        self._too_long.add(row_id, length)
        if prompt.images:
            self._uncuttable.add(row_id, length)

    def result(self) -> CheckedPrompts:
        if self._unreadable.number:
            raise PromptError(
                f"{self._unreadable.number} of {self._checked} prompts cannot be sampled from. {self._unreadable}. "
                "Correct these rows of the data set, or leave them out"
            )
        longer = f"prompts are longer than the {self._room} tokens that sample.max_tokens leaves of {self._limit}"
        found = f"{self._too_long.number} of {self._checked} {longer}. {self._too_long}"
        if self._too_long.number and self._how == "error":
            ways_out = "sample.long_prompts to drop or truncate_left"
            if self._uncuttable.number:
                ways_out += " (texts only); where pictures make it long, lower speaker.max_pixels"
            raise PromptError(
                f"{found}. Raise sample.max_model_len where the model allows it, lower sample.max_tokens, or set "
                f"{ways_out}"
            )
        if self._uncuttable.number and self._how == "truncate_left":
            raise PromptError(
                f"{self._uncuttable.number} {longer} and have images, which cannot be cut: {self._uncuttable}. Lower "
                "speaker.max_pixels, or set sample.long_prompts = drop"
            )
        checked = CheckedPrompts(self._checked, self._room, frozenset(self._long), self._how)
        if self._long and len(self._long) == self._rows and self._how == "drop":
            raise PromptError(f"{found}: sample.long_prompts = drop leaves none")
        if self._too_long.number:
            log.warning("%s: %s", "dropped" if self._how == "drop" else "cut on the left", found)
        return checked


def check_stops(stops: Sequence[str], tokenizer: Any, control: Sequence[str]) -> None:
    """Refuse stops that would never end a completion.

    Parameters
    ----------
    stops
        `Sampling.stop`; `Sampling` itself refuses empty ones.
    tokenizer
        The model's.
    control
        Its control tokens, of which a completion's text holds none.

    Raises
    ------
    PromptError
        For a stop that is no text, holds a control token, or that the tokenizer writes in another way.
    """
    for stop in stops:
        held = [token for token in control if token in stop]
        try:
            stop.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the stop {stop!r} is no text: {error.reason}") from None
        if held:
            raise PromptError(
                f"the stop {stop!r} holds the control token {held[0]}, which is in no completion's text: the model's "
                "own end tokens end completions anyway. Leave it out"
            )
        ids = tokenizer(stop, add_special_tokens=False)["input_ids"]
        written = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if written != stop:
            raise PromptError(f"the tokenizer does not write the stop {stop!r} but {written!r}: name that instead")
