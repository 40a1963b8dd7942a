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
import signal
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, Literal

from hpc_rl.grading.extraction import answer_of

log = logging.getLogger("hpc_rl")

Answers = Literal["math", "text"]

LONGEST = 300
"""Characters of an answer that is read as mathematics; longer ones are compared as text alone."""
LIMIT_S = 2.0
"""Time for one comparison by math-verify. 10^(10^10) is written in a few characters."""
PLACES = 6

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*[$€£¥]?\s*(?P<sign2>[+-]?)"
    r"(?P<whole>\d{1,3}(?:[, ]\d{3})+|\d+)?(?P<part>\.\d+)?(?P<power>[eE][+-]?\d{1,2})?"
    r"(?:\s*/\s*(?P<under>[1-9]\d*))?\s*(?P<percent>%)?"
)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d+)?\s*\\[dt]?frac\s*(?:\{(?P<over>\d+)\}\s*\{(?P<under>[1-9]\d*)\}|(?P<two>\d[1-9]))"
)
_UNIT = re.compile(
    r"(?P<core>.*[\d%)}])(?:\s*\\(?:text|mathrm|mbox)\s*\{(?P<tex>[^{}]*)\}|\s*(?P<long>[A-Za-z]{3,}[A-Za-z. ]*|"
    r"cm|mm|km|dm|kg|mg|ml|ft|mi|lb|oz|hr|am|pm)|\s+(?P<short>[mgshl]))(?P<power>\^?\{?[23]\}?)?"
)
_COMMAND = re.compile(r"\\(?!text|mathrm|mbox|textbf)[A-Za-z]+")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "max", "min", "gcd", "lcm"}
)
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_WORD = 3
"""Letters in a row that are a word; fewer are variables, as in 2xy."""
MOST_BRACKETS = 40


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
        return _split_unit(_plain(self.text))

    @property
    def unit(self) -> str:
        """Its unit; "" for none."""
        return self._parts[1]

    @cached_property
    def number(self) -> _Number | None:
        """Its value, where it is a plain number."""
        return _number(self._parts[0])

    @cached_property
    def expression(self) -> Any:
        """What math-verify makes of it; None where it makes nothing of it, or where it has words."""
        return _parse(self._parts[0])


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
        core, unit = _split_unit(_plain(answer))
        equal = self._equal(reference, core)
        if unit == reference.unit or (equal and not (unit and reference.unit)):
            return equal
        return None  # another unit: perhaps the same in other words

    def _equal(self, reference: Reference, core: str) -> bool | None:
        number = _number(core)
        if number is not None and reference.number is not None:
            return number.same(reference.number)
        expression = _parse(core)
        if expression is None or reference.expression is None:
            return None
        return _verify(reference.expression, expression)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    decimal: bool
    percent: bool

    def same(self, other: _Number) -> bool:
        return any(
            one == two or ((self.decimal or other.decimal) and round(one, PLACES) == round(two, PLACES))
            for one in self._readings()
            for two in other._readings()
        )

    def _readings(self) -> tuple[Fraction, ...]:
        return (self.value, self.value / 100) if self.percent else (self.value,)


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


def _number(text: str) -> _Number | None:
    if len(text) > LONGEST:
        return None
    match = _FRACTION.fullmatch(text)
    if match is not None:
        over, under = (match["over"], match["under"]) if match["two"] is None else (match["two"][0], match["two"][1])
        value = int(match["whole"] or 0) + Fraction(int(over), int(under))
        return _Number(-value if match["sign"] == "-" else value, False, False)
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["part"]) or (match["sign"] and match["sign2"]):
        return None
    digits = re.sub("[, ]", "", match["whole"] or "0") + (match["part"] or "") + (match["power"] or "")
    value = Fraction(digits) / int(match["under"] or 1)
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    return _Number(sign * value, bool(match["part"] or match["power"]), bool(match["percent"]))


def _split_unit(plain: str) -> tuple[str, str]:
    """A value and its unit in small letters, without the s of a plural; "" for none. 5x has none, 5 m has one."""
    match = _UNIT.fullmatch(plain) if len(plain) <= LONGEST else None
    if match is None:
        return plain, ""
    name = match["tex"] or match["long"] or match["short"] or ""
    power = re.sub(r"[\^{}]", "", match["power"] or "")
    return match["core"].strip(), " ".join(name.replace(".", " ").casefold().split()).removesuffix("s") + power


def _has_words(text: str) -> bool:
    """Words, which math-verify would take for products of variables: to it, dog is god."""
    runs = [run for run in _LETTERS.findall(_COMMAND.sub(" ", text)) if run.lower() not in _FUNCTIONS]
    return any(len(run) >= _WORD or run == text for run in runs)


def _parse(plain: str) -> Any:
    """A list of what math-verify reads in an answer; None for nothing, for words, and for what takes too long."""
    if not plain or len(plain) > LONGEST or _has_words(plain) or plain.count("{") + plain.count("(") > MOST_BRACKETS:
        return None
    from math_verify import parse

    try:
        with _limited():
            found = parse(rf"\boxed{{{plain}}}", fallback_mode="no_fallback", parsing_timeout=0)
    except _TooLong:
        return None
    return found or None


def _verify(reference: Any, answer: Any) -> bool | None:
    """None where it takes too long."""
    from math_verify import verify

    try:
        with _limited():
            return bool(verify(reference, answer, float_rounding=PLACES, timeout_seconds=0))
    except _TooLong:
        return None


@cache
def _say_that_there_is_no_limit() -> None:
    log.warning(
        "no time limit on answers outside of the main thread (--executor debug): a hostile one may hang the job"
    )


class _TooLong(BaseException):
    """No Exception: sympy catches those and goes on."""


@contextmanager
def _limited() -> Iterator[None]:
    """Ends what takes longer than `LIMIT_S`; again and again, should somebody catch even this."""
    if threading.current_thread() is not threading.main_thread():
        _say_that_there_is_no_limit()
        yield
        return
    armed = True

    def ring(number: int, frame: object) -> None:
        if armed:
            raise _TooLong

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, LIMIT_S, LIMIT_S / 4)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        armed = False  # it may have rung between the two
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
