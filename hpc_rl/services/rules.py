"""A teacher without a model: a function says what it answers. For runs whose questions a rule can judge, and tests."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc_rl.config.services import TeacherServiceConfig
from hpc_rl.services.frame import CannotServe, TokenCounts
from hpc_rl.services.teacher import Chat, Said, Unsaid, until_stop

Rules = Callable[[Sequence[Mapping[str, str]], int], str]
"""Messages and seed of a chat → the answer; ValueError for a chat that has none."""

MOST_WORDS = 131_072
"""Longest prompt and answer together, where `max_model_len` says nothing."""


class WordCount:
    """Lengths of chats; a word is a token.

    Parameters
    ----------
    max_tokens
        Longest prompt and answer together.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Words of a prompt."""
        return sum(len(message["content"].split()) for message in messages)


class RuleWriter:
    """Answers a batch of chats by rules, within the limits of `hpc_rl.services.teacher.Writer`.

    Parameters
    ----------
    rules
        What answers. It is told of no schema: whether its JSON is as asked for is looked at by who asks.
    reader
        Counts words.
    max_tokens
        Longest answer to a chat that names no length.
    """

    def __init__(self, rules: Rules, reader: WordCount, max_tokens: int) -> None:
        self._rules, self.reader, self._max_tokens = rules, reader, max_tokens
        self.tokens = TokenCounts()

    def __call__(self, chats: Sequence[Chat]) -> list[Said | Unsaid]:
        """The answer to each, in order."""
        return [self._answer(chat) for chat in chats]

    def _answer(self, chat: Chat) -> Said | Unsaid:
        length, limit = self.reader.length(chat.messages), self.reader.max_tokens
        longest = chat.max_tokens or max(1, min(self._max_tokens, limit - length))
        if length + longest > limit:
            return Unsaid(f"the prompt has {length} words and the answer may have {longest}; at most {limit} together")
        try:
            text = self._rules(chat.messages, chat.seed)
        except ValueError as error:
            return Unsaid(f"the rules have no answer: {error}")
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        written = min(len(ends), longest)
        self.tokens.prompt += length
        self.tokens.completion += written
        whole = len(ends) <= longest
        text, reason = until_stop(
            text if whole else text[: ends[longest - 1]], "stop" if whole else "length", chat.stops
        )
        return Said(text, reason, length, written)


def open_rules(section: str, options: TeacherServiceConfig) -> tuple[RuleWriter, str]:
    """What answers by the function that `services.SECTION.rules` names, and a hash of the file that it is in.

    Raises
    ------
    CannotServe
        When there is no such function.
    """
    assert options.rules is not None, "the config says so"
    rules, source = _load(options.rules, f"services.{section}.rules: {options.rules}")
    reader = WordCount(options.max_model_len or MOST_WORDS)
    digest = hashlib.sha256(f"{options.rules}\n{source}".encode()).hexdigest()
    return RuleWriter(rules, reader, options.max_tokens), digest


def _load(name: str, field: str) -> tuple[Rules, str]:
    path, _, function = name.partition(":")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        way_out = "it must be a module of this project or of a package that is installed where the service runs"
        raise CannotServe(f"{field} cannot be imported ({error}); {way_out}") from error
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise CannotServe(f"{field}: {path} has no function {function}")
    return found, inspect.getsource(module)
