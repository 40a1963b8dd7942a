"""Checking answers by rule (S2): is what a completion ends with the same as the reference answer?

checker = Checker("math")
reference = checker.reference("1/2")
checker.verdict(reference, r"Half of one is \\boxed{0.5}.")         # Verdict(right=True, answer="0.5")

A rule knows when it cannot say: `right` is None then, and a teacher may be asked. It is True or False only for

    text    the same words, whatever their case and spacing; anything else is wrong
    math    the same words or symbols; numbers, with or without a unit; expressions, sets, intervals, equations …
            (math-verify). Words that differ are for a teacher: "Monday" and "on Monday", "180 minutes" and "3 hours".

A per cent sign is read both ways, as math-verify does: 50% is 50 and is 0.5, since questions ask for either. Decimals
are compared to six places, so 0.333333 is a third, and 0.33 is not.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hpc_rl.grading.extraction import answer_of
from hpc_rl.grading.formulas import parse_formula, same_formula
from hpc_rl.grading.numbers import LONGEST, Number, number_of, split_unit

Answers = Literal["math", "text"]
_CHOICE = re.compile(r"\(?[a-j]\)?")
_CHOICE_WITH_TEXT = re.compile(r"\s*(?:\\text\s*\{)?\s*(?:\([A-Ja-j]\)|[A-J][.:)])\s*\S")
"""A letter in brackets, or with a stop behind it, and what it stands for."""


@dataclass(frozen=True)
class Verdict:
    """What the rule says about a completion.

    Attributes
    ----------
    right
        None where it cannot say.
    answer
        As extracted; None where the completion gives none.
    """

    right: bool | None
    answer: str | None


@dataclass(frozen=True)
class Reference:
    """A reference answer, read once however many attempts are compared with it.

    Attributes
    ----------
    text
        As it came.
    answers
        How it is compared.
    """

    text: str
    answers: Answers

    @cached_property
    def words(self) -> str:
        """Equal for answers that are the same words or symbols."""
        return _words(self.text)

    @property
    def checkable(self) -> bool:
        """The rule can call an answer wrong; else it knows the right words alone, and teachers must judge the rest.

        For mathematics this parses.
        """
        return bool(self.words) and (self.answers == "text" or self.number is not None or self.expression is not None)

    @cached_property
    def compared(self) -> dict[str, bool | None]:
        """Answers that it has been compared with, since attempts at a question often end in the same one."""
        return {}

    @cached_property
    def _parts(self) -> tuple[str, str]:
        return split_unit(_plain(self.text))

    @property
    def unit(self) -> str:
        """Its unit; "" for none."""
        return self._parts[1]

    @cached_property
    def number(self) -> Number | None:
        """Its value, where it is a plain number."""
        return number_of(self._parts[0])

    @cached_property
    def expression(self) -> Any:
        """What math-verify makes of it; None where it makes nothing of it, or where it has words."""
        return parse_formula(self._parts[0])


class Checker:
    """Compares answers. In the main thread: what takes too long is ended by a signal, and others get none.

    Parameters
    ----------
    answers
        `grade.answers`.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        if answers == "math":
            logging.getLogger("math_verify").setLevel(
                logging.ERROR
            )  # it says that its own time limit is off: ours is on

    def reference(self, text: str) -> Reference:
        """The reference answer of a question."""
        return Reference(text, self.answers)

    def verdict(self, reference: Reference, completion: str, *, cut_off: bool = False) -> Verdict:
        """Is a completion right?

        Parameters
        ----------
        completion
            The whole text. Its answer is what it puts into the last box, or says to be its answer, or ends with
            (`extraction`); thoughts in `<think>` count for nothing.
        cut_off
            It reached the longest length (`finish_reason` is `length`): wrong, whatever it had said by then.
        """
        answer, how = answer_of(completion, whole=self.answers == "text")
        if cut_off or not completion.strip():
            return Verdict(False, answer)
        if answer is None:
            return Verdict(None, None)
        if answer not in reference.compared:
            reference.compared[answer] = self._same(reference, answer)
        right = reference.compared[answer]
        # what a completion happens to end with need not be its answer: that may make it right, but not wrong
        return Verdict(right if right or how != "end" else None, answer)

    def _same(self, reference: Reference, answer: str) -> bool | None:
        if reference.words and reference.words == _words(answer):
            return True
        if self.answers == "text":
            return False
        if reference.words.casefold() == _words(answer).casefold() != "":
            return None  # TeX: \Gamma and \gamma, which math-verify does not tell apart
        if len(answer) > LONGEST or len(reference.text) > LONGEST:
            return None
        if _CHOICE.fullmatch(reference.words) and _CHOICE_WITH_TEXT.match(answer):
            return None  # "(B) 5": which choice, or which value, is for a teacher
        core, unit = split_unit(_plain(answer))
        equal = self._equal(reference, core)
        if unit == reference.unit or (equal and not (unit and reference.unit)):
            return equal
        return None  # another unit: perhaps the same in other words

    def _equal(self, reference: Reference, core: str) -> bool | None:
        number = number_of(core)
        if number is not None and reference.number is not None:
            return number.same(reference.number)
        expression = parse_formula(core)
        if expression is None or reference.expression is None:
            return None
        return same_formula(reference.expression, expression)


def _words(text: str) -> str:
    """Case, spacing, kinds of characters, wrappers and the full stop at the end make no difference."""
    plain = unicodedata.normalize("NFKC", _unwrap(text))
    plain = plain if "\\" in plain else plain.casefold()  # in TeX case makes another symbol
    return " ".join(plain.split()).strip().rstrip(".").rstrip()


def _unwrap(text: str) -> str:
    """Without `$ $`, `\\( \\)`, `\\[ \\]`, `** **` and `\\text{ }` around it."""
    text = text.strip()
    for opening, closing in (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)]
            if opening not in inner:
                text = inner.strip()
    inside = re.fullmatch(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", text)
    return inside[1].strip() if inside else text


def _plain(text: str) -> str:
    """As mathematics is read: one kind of minus, no spaces of TeX, no full stop at the end."""
    text = unicodedata.normalize("NFKC", _unwrap(text)).replace("\u2212", "-").replace("\u2013", "-")
    text = re.sub(r"\\[,;:! ]|~", " ", text).replace(r"\$", "$").replace(r"\%", "%").replace("{,}", ",")
    return _unwrap(text.strip().rstrip(".").rstrip())
