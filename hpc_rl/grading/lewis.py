"""Grading in the Lewis game: what a description says, what the listener is asked, what it is worth (L3, L6–L10)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AccuracyMode = Literal["argmax", "soft_gated"]

TAGS = ("thinking", "coarse", "detailed")
UNDECIDED = -1
"""`predicted_index` of a score that picks nobody: a tie for the first place, or a P(yes) that is no number (L2)."""
LENGTH_REWARD = 0.1
UNSURE_BELOW = 0.3

_MARKS = tuple(mark for tag in TAGS for mark in (f"<{tag}>", f"</{tag}>"))
_ANY_TAG = re.compile(r"<\s*(/?)\s*(thinking|coarse|detailed)\s*>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+")
_BEFORE_MORE = frozenset({"mr", "mrs", "ms", "dr", "prof", "st", "vs", "approx", "e.g", "i.e", "cf", "ca"})
"""Abbreviations that never end a sentence."""
_MAY_END = frozenset({"etc", "a.m", "p.m", "jr", "sr"})
"""Abbreviations that end a sentence when a capital follows."""


@dataclass(frozen=True)
class Description:
    """What the speaker says about the target; a part that it left out is empty, but never both."""

    coarse: str
    detailed: str


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the reward (L10)."""

    accuracy: float = 1.0
    format: float = 1.0
    length: float = 1.0


@dataclass(frozen=True)
class Reward:
    """The parts of a sample's reward, before weighting."""

    accuracy: float
    format: float
    length: float

    def total(self, weights: Weights) -> float:
        """Σ weight · part (L10)."""
        return weights.accuracy * self.accuracy + weights.format * self.format + weights.length * self.length


def is_well_formed(text: str) -> bool:
    """True when each of the three tags is opened and closed exactly once, in order (L6, L8).

    Case matters, spaces inside the brackets do not pass, and a tag that is only quoted inside another part counts as a
    second one. Text around and between the parts is allowed: the rule speaks of tags alone.
    """
    at = [text.find(mark) for mark in _MARKS]
    return all(text.count(mark) == 1 for mark in _MARKS) and at == sorted(at)


def parse(text: str) -> Description | None:
    """The description in a completion, well-formed or not (L6).

    A part runs from its tag to the next tag of any kind or to the end, so a missing closing tag costs nothing here;
    case and spaces in tags are forgiven; of a repeated part the last one that is not empty counts. Where there is
    neither a coarse nor a detailed part, the words outside of the thinking are taken as the detailed part.

    Returns
    -------
    Description or None
        None when nothing is said about the image: only thinking, or nothing at all.
    """
    parts, outside = _read_tags(text)
    coarse, detailed = parts.get("coarse", ""), parts.get("detailed", "")
    if not coarse and not detailed:
        detailed = " ".join(outside)
    return Description(coarse, detailed) if coarse or detailed else None


def thinking(text: str) -> str:
    """The thinking in a completion, read as tolerantly as `parse` reads the rest; "" where there is none."""
    return _read_tags(text)[0].get("thinking", "")


def _read_tags(text: str) -> tuple[dict[str, str], list[str]]:
    """The parts of a completion that are not empty, by tag, and the words outside of all of them."""
    parts: dict[str, str] = {}
    outside: list[str] = []
    inside, start = "", 0
    for match in [*_ANY_TAG.finditer(text), None]:
        words = text[start : match.start() if match else len(text)].strip()
        if words and inside:
            parts[inside] = words
        elif words:
            outside.append(words)
        if match:
            inside, start = "" if match[1] else match[2].lower(), match.end()
    return parts, outside


def question(template: str, description: Description) -> str:
    """What the listener is asked about a description (L3).

    Parameters
    ----------
    template
        Text with `{coarse}` and `{detailed}`; other braces stand for themselves. A coarse part that ends with a full
        stop loses it, as the template brings its own; where a part is missing, `{coarse}. {detailed}` is the other.
    """
    coarse = description.coarse.rstrip().removesuffix(".")
    both = ". ".join(part for part in (coarse, description.detailed) if part)
    values = {"{coarse}. {detailed}": both, "{coarse}": coarse, "{detailed}": description.detailed}
    return re.sub(r"\{coarse\}\. \{detailed\}|\{coarse\}|\{detailed\}", lambda match: values[match[0]], template)


def decide(yes_probabilities: Sequence[float]) -> int:
    """Index of the largest P(yes); `UNDECIDED` for a tie at the top, for a NaN anywhere, and for no candidates (L2)."""
    if not yes_probabilities or any(math.isnan(p) for p in yes_probabilities):
        return UNDECIDED
    best = max(yes_probabilities)
    return list(yes_probabilities).index(best) if list(yes_probabilities).count(best) == 1 else UNDECIDED


def accuracy_reward(yes_probabilities: Sequence[float], predicted_index: int, label: int, mode: AccuracyMode) -> float:
    """Did the listener pick the target (L7)?

    `argmax`: 1 or 0. `soft_gated`: 0 unless it picked the target; then p / Σp for its P(yes) p, the larger the further
    the other candidates lie behind, halved where the listener was sure of nothing (p < 0.3).
    """
    if predicted_index == UNDECIDED or predicted_index != label:
        return 0.0
    if mode == "argmax":
        return 1.0
    picked = yes_probabilities[predicted_index]
    share = picked / math.fsum(yes_probabilities) if picked else 0.0
    return share / 2 if picked < UNSURE_BELOW else share


def format_reward(text: str) -> float:
    """1 if the completion is well-formed, else 0 (L8)."""
    return float(is_well_formed(text))


def length_reward(text: str) -> float:
    """0.1 if `<detailed>` is there once, closed, and holds exactly one sentence; else 0 (L9)."""
    before, opened, rest = text.partition("<detailed>")
    inner, closed, after = rest.partition("</detailed>")
    once = bool(opened and closed) and "detailed>" not in before + inner + after
    return LENGTH_REWARD if once and count_sentences(inner) == 1 else 0.0


def count_sentences(text: str) -> int:
    """How many sentences a text has.

    A sentence ends with `.`, `!`, `?` or their runs (`...`, `?!`) before white space or the end of the text; `3.5 cm`,
    `e.g. this`, `Dr. Who` and initials do not end one. Words after the last end count as a sentence too.
    """
    count = start = 0
    for match in _SENTENCE_END.finditer(text):
        words, rest = text[start : match.start()], text[match.end() :].lstrip()
        if rest and match[0] == "." and _is_abbreviation(words, rest):
            continue
        count += _has_words(words)
        start = match.end()
    return count + _has_words(text[start:])


def _is_abbreviation(words: str, rest: str) -> bool:
    last = (words.split() or [""])[-1].lstrip("(\"'“‘")
    initial = len(last) == 1 and last.isupper()
    return initial or last.lower() in _BEFORE_MORE or (last.lower() in _MAY_END and not rest[0].isupper())


def _has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)
