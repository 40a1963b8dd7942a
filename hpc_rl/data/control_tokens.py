"""Texts that a model's tokenizer takes for control tokens, read from its files without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def control_tokens(model: Path) -> tuple[str, ...]:
    """At least those that `hpc_rl.engines.loading.control_tokens` finds, which needs seconds and torch for it.

    A text that holds one of them cannot be a message of a chat: the template would show it as the message's end.

    Raises
    ------
    ValueError
        When the folder has none of the files that say it.
    """
    files = [path for name in FILES if (path := model / name).is_file()]
    if not files:
        raise ValueError(f"{model} has none of {', '.join(FILES)}: copy the model's tokenizer there")
    found = {token for path in files for token in _special(json.loads(path.read_text(encoding="utf-8")))}
    return tuple(sorted(found - {""}))


class ControlTokens:
    """Finds control tokens in texts.

    Parameters
    ----------
    model
        A model's folder.
    """

    def __init__(self, model: Path) -> None:
        found = control_tokens(model)
        self._any = re.compile("|".join(map(re.escape, found))) if found else None  # one search, however many there are

    def are_in(self, text: str) -> bool:
        """True where a text holds one."""
        return self._any is not None and self._any.search(text) is not None


def _special(content: dict[str, Any]) -> Iterator[str]:
    added = content.get("added_tokens", [])  # tokenizer.json
    for token in (*added, *content.get("added_tokens_decoder", {}).values()):
        if token.get("special"):
            yield token["content"]
    for name, value in content.items():
        if name.endswith(("_token", "special_tokens")):
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    """Of a token, or of tokens in a list or by name."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
