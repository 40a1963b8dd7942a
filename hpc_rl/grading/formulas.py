"""Formulas in answers, compared by math-verify: never words, and never for longer than a moment."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from hpc_rl.grading.numbers import LONGEST, PLACES

log = logging.getLogger("hpc_rl")

LIMIT_S = 2.0
"""CPU time of one step of math-verify, so that a busy machine has no other verdicts. 10^(10^10) is easily written."""
_COMMAND = re.compile(r"\\(?!text|mathrm|mbox|textbf)[A-Za-z]+")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "max", "min", "gcd", "lcm"}
)
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_WORD = 3
"""Letters in a row that are a word; fewer are variables, as in 2xy."""
MOST_BRACKETS = 40


def _has_words(text: str) -> bool:
    """Words, which math-verify would take for products of variables: to it, dog is god."""
    runs = [run for run in _LETTERS.findall(_COMMAND.sub(" ", text)) if run.lower() not in _FUNCTIONS]
    return any(len(run) >= _WORD or run == text for run in runs)


def parse_formula(plain: str) -> Any:
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


def same_formula(reference: Any, answer: Any) -> bool | None:
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

    began = time.process_time()
    handler = signal.signal(signal.SIGPROF, ring)
    left, interval = signal.setitimer(signal.ITIMER_PROF, LIMIT_S, LIMIT_S / 4)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        armed = False  # it may have rung between the two
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        if left:  # somebody else's
            signal.setitimer(signal.ITIMER_PROF, max(left - (time.process_time() - began), 1e-3), interval)
