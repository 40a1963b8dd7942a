"""Texts of others in a prompt: each under its title in a fence of its own, so that none can pass for another.

What a solver wrote goes to whoever judges it. A fence is longer than any run of backticks in its text, so an attempt
that ends its fence and goes on with a reference answer of its own invention stays within (CommonMark 4.5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SHOWN_CHARACTERS = 8000
"""Of one text; more of it loses its middle. Questions and answers are shorter, attempts go round in circles."""
_SECTION = re.compile(r"^# (?P<title>[^\n]*)\n(?P<fence>`{3,})\n(?P<text>.*?)\n(?P=fence)$", re.DOTALL | re.MULTILINE)


def write(sections: Mapping[str, str]) -> str:
    """A prompt of these texts, by title."""
    return "\n\n".join(_section(title, text) for title, text in sections.items())


def read(prompt: str) -> dict[str, str]:
    """The texts of a prompt that `write` made, by title."""
    return {match["title"]: match["text"] for match in _SECTION.finditer(prompt)}


def said(attempt: str) -> str:
    """What a solver says after its thoughts; all of it where it says nothing after them, or has none."""
    return attempt.rpartition("</think>")[2].strip() or attempt


def shortened(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """A text of about so many characters at most: its beginning and its end, which has the answer."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _section(title: str, text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"# {title}\n{fence}\n{text}\n{fence}"
