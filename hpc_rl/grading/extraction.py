"""Finding the answer in a completion: in the last box, after the words that announce it, or at its end."""

from __future__ import annotations

import re
from typing import Literal

How = Literal["boxed", "said", "end", "whole", "none"]

TAIL = 2000
"""Characters at the end of a completion in which an answer without a box is looked for."""

TRIES = 10
"""Boxes, from the end, that are looked at: a completion may have thousands that do not close."""

_COMMANDS = ("\\boxed", "\\fbox")
_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*(\S.*)")
_SAID = re.compile(r"\banswer(?:\s+is\s*:?|\s*:|\s*=)\**[ \t]*\n?[ \t]*(\S[^\n]*)", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?](?=\s|\**$)")
_LAST = re.compile(
    r"\$(?P<dollar>[^$\n]+)\$|\\\((?P<round>[^\n]+?)\\\)|\\\[(?P<square>[^\]]+?)\\\]|(?P<number>-?\d[\d,]*(?:\.\d+)?%?)"
)


def answer_of(completion: str, *, whole: bool = False) -> tuple[str | None, How]:
    r"""The answer that a completion gives, and where it was found.

    Parameters
    ----------
    completion
        Text. What stands before `</think>` counts for nothing.
    whole
        Take all of the text where there is no box.

    Returns
    -------
    answer, how
        `boxed`: what is inside the last `\boxed{…}` whose braces close. `said`: after `####` (GSM8K) or "answer is",
        "answer:"; the rest of that sentence. `end`: the last formula or number. `whole`: all of it. `none`: None.
    """
    text = completion.rpartition("</think>")[2].strip()
    boxed = _last_box(text)
    if boxed is not None:
        return boxed, "boxed"
    if whole:
        return (text, "whole") if text else (None, "none")
    tail = text[-TAIL:]
    for pattern in (_HASHES, _SAID):
        found = pattern.findall(tail)
        if found:
            said = _SENTENCE.split(found[-1], maxsplit=1)[0] if pattern is _SAID else found[-1]
            return said.strip().strip("*").strip(), "said"
    found = [match[match.lastgroup or 0] for match in _LAST.finditer(tail)]
    return (found[-1].strip().rstrip(","), "end") if found else (None, "none")


def _last_box(text: str) -> str | None:
    """What is inside the last box whose braces close, of the last `TRIES` boxes; of nested ones the inner."""
    end = len(text)
    for _ in range(TRIES):
        start = max(text.rfind(command, 0, end) for command in _COMMANDS)
        if start < 0:
            return None
        found = _inside(text, start)
        if found:
            return found
        end = start
    return None


def _inside(text: str, start: int) -> str | None:
    """What is between the braces after a command; None where they do not close."""
    opening = _OPENING.match(text, start)
    if opening is None:
        return None
    depth = 1
    for mark in _BRACE.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if not depth:
            return text[opening.end() : mark.start()].strip()
    return None
