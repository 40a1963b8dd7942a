"""From texts and chats to token ids, as the models will meet them again when they answer.

A prompt is a plain text, or the messages of a chat. It is tokenised by itself, as an engine does before it samples, and
so is what follows it: no token reaches across the border, which is where the loss begins. (TRL tokenises both in one
piece and then looks for the border.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hpc_rl.engines.base import NO_VARIABLES
from hpc_rl.engines.loading import control_tokens, tokenizer_of
from hpc_rl.training.data import columns
from hpc_rl.training.data.columns import CHAT, STRING, TOKENS, Rows

Chat = Sequence[Mapping[str, str]]
NOWHERE = "(?!)"
"""A pattern that no text has."""


class NotShown(ValueError):
    """What the chat template does not show as it is; the message says why."""


def tokens(
    file: Path, id: str, answers: Sequence[str], encoder: Encoder, more: Mapping[str, pa.DataType]
) -> Iterator[tuple[Rows, dict[str, pa.Array]]]:
    """Rows of a file with their prompts and answers as token ids, some at a time.

    Parameters
    ----------
    id
        The column that names rows.
    answers
        What follows the column `prompt`. Where the file has `prompt_token_ids` and `ANSWER_token_ids` these are taken.
    encoder
        For texts.
    more
        Other columns to read.

    Yields
    ------
    tuple
        Rows, and by name their columns `prompt_token_ids` and `ANSWER_token_ids`; none of the lists is empty.

    Raises
    ------
    UnusableData
        When something is missing, of another type or empty, or cannot be shown by the chat template.
    """
    texts = ("prompt", *answers)
    ids = [f"{name}_token_ids" for name in texts]
    if columns.choose(file, ids, texts) == 0:
        for rows in columns.read(file, id, {**dict.fromkeys(ids, TOKENS), **more}):
            yield rows, {name: rows[name] for name in ids}
        return
    kind = CHAT if pa.types.is_nested(columns.types_of(file)["prompt"]) else STRING
    for rows in columns.read(file, id, {"prompt": kind, **dict.fromkeys(answers, STRING), **more}):
        found = [encoder.prompts(rows, "prompt"), *(encoder.answers(rows, "prompt", answer) for answer in answers)]
        made = {name: pa.array(values, TOKENS) for name, values in zip(ids, found, strict=True)}
        for text, values in zip(texts, made.values(), strict=True):
            rows.refuse_first(pc.equal(pc.list_value_length(values), 0), text, "it has no tokens")
        yield rows, made


class Encoder:
    """Tokenises columns of text.

    Parameters
    ----------
    tokenizer
        Of the model, or its processor.
    variables
        Of its chat template (`chat_template_kwargs`).
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] = NO_VARIABLES) -> None:
        self._tokenizer, self._variables = tokenizer_of(tokenizer), variables

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Finds any control token: one search, however many there are."""
        return re.compile("|".join(map(re.escape, control_tokens(self._tokenizer))) or NOWHERE)

    def prompts(self, rows: Rows, column: str) -> list[list[int]]:
        """Token ids of plain prompts, special tokens of the tokenizer's own included, or of chats, up to where the
        assistant answers."""
        said = rows[column].to_pylist()
        if rows[column].type == STRING:
            return self._ids(said, True)
        opened = []
        for row, chat in enumerate(said):
            with _named(rows, row, column):
                opened.append(self._opened(chat))
        return self._ids(opened, False)

    def answers(self, rows: Rows, prompt: str, column: str) -> list[list[int]]:
        """Token ids of what follows a prompt: of a plain text and the end-of-text token after it; of what an assistant
        says and what the chat template puts behind it."""
        said = rows[column].to_pylist()
        if rows[prompt].type == STRING:
            end = self._tokenizer.eos_token_id
            if end is None:
                rows.refuse(0, column, "the tokenizer has no eos_token, so nothing would end the text")
            return [[*ids, end] for ids in self._ids(said, False)]
        behind = []
        for row, (chat, text) in enumerate(zip(rows[prompt].to_pylist(), said, strict=True)):
            with _named(rows, row, column):
                self._check(text)
            with _named(rows, row, prompt):
                opened = self._opened(chat)
            with _named(rows, row, column):
                behind.append(self._behind(opened, chat, text))
        return self._ids(behind, False)

    def answer(self, chat: Chat, text: str) -> list[int]:
        """Token ids of one answer, as `answers` has them.

        Raises
        ------
        NotShown
        """
        self._check(text)
        return self._ids([self._behind(self._opened(chat), chat, text)], False)[0]

    def solutions(self, rows: Rows, question: str, solution: str, system_prompt: str | None) -> list[list[int]]:
        """Token ids of questions with solutions, as the reward-model service shows them to its model."""
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        texts = []
        for row, (asked, said) in enumerate(
            zip(*(rows[name].to_pylist() for name in (question, solution)), strict=True)
        ):
            chat: Chat = [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            with _named(rows, row, question):
                self._check(asked)
            with _named(rows, row, solution):
                self._check(said)
            with _named(rows, row, question):
                texts.append(self._render(chat))
        return self._ids(texts, False)

    def _opened(self, chat: Chat) -> str:
        """The prompt, up to where the assistant answers."""
        for message in chat:
            self._check(message["content"])
        return self._render(chat, add_generation_prompt=True)

    def _behind(self, opened: str, chat: Chat, text: str) -> str:
        """What the template puts behind the opened prompt for this answer."""
        whole = self._render([*chat, {"role": "assistant", "content": text}])
        if not whole.startswith(opened):
            raise NotShown(
                "the chat template does not show an answer as the continuation of its prompt (it may drop or add "
                "something before it, like thoughts). Give token ids in place of texts"
            )
        return whole[len(opened) :]

    def _check(self, text: str) -> None:
        if found := self._control.search(text):
            raise NotShown(f"it holds the control token {found[0]}, which would end a message in the chat")

    def _render(self, chat: Chat, **more: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise NotShown("it is a chat, but the model has no chat template (chat_template.jinja)")
        try:
            text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, **more, **self._variables)
        except Exception as error:  # templates are programs, and raise what they like
            raise NotShown(f"the chat template does not take these messages: {error}") from error
        return text

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return found


@contextmanager
def _named(rows: Rows, row: int, column: str) -> Iterator[None]:
    """Says which value it is that is not shown."""
    try:
        yield
    except NotShown as error:
        raise rows.complaint(row, column, str(error)) from error
