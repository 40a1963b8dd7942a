"""Questions and attempts that look like mathematics, for benchmarks: answers of several kinds and forms."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

KINDS = {"integer": 0.75, "decimal": 0.08, "fraction": 0.10, "expression": 0.05, "tuple": 0.02}
"""How often an answer is of a kind: assumed, between GSM8K (integers only) and MATH."""
CHARACTERS, SOLUTION = 600, 250
"""Of reasoning before the answer in an attempt, and in a reference solution (GSM8K's have about as many)."""


@dataclass(frozen=True)
class Made:
    """A question, its answer in the forms that are right, and a few wrong answers."""

    question: str
    forms: tuple[str, ...]
    wrong: tuple[str, ...]


def made(number: int, kinds: Sequence[str] = tuple(KINDS), seed: int = 0) -> Made:
    """Question `number`; the same for the same seed."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choices(kinds, [KINDS[one] for one in kinds])[0]
    a, b = draw.randint(2, 999), draw.randint(2, 99)
    forms, wrong = {
        "integer": lambda: ((f"{a * b}", f"{a * b:,}", f"{a * b} dollars"), (f"{a + b}", f"{a - b}")),
        "decimal": lambda: ((f"{a}.{b:02d}", rf"\${a}.{b:02d}"), (f"{a}.{b + 1:02d}", f"{b}")),
        "fraction": lambda: (
            (rf"\frac{{{a}}}{{{1000 + b}}}", f"{a}/{1000 + b}"),
            (rf"\frac{{{b}}}{{{a + 1}}}", f"{a}"),
        ),
        "expression": lambda: ((rf"{b}x^2+{a}x", rf"x({b}x+{a})"), (rf"{b}x^2-{a}x", rf"{a}\sqrt{{{b}}}")),
        "tuple": lambda: ((f"({a},{b})", rf"\left({a}, {b}\right)"), (f"({b},{a + 1})", f"({a},{a})")),
    }[kind]()
    return Made(f"Question {number}: of {a} and {b}, what is the {kind}?", forms, wrong)


def solution(of: Made) -> str:
    """The reference solution of a question; it ends in the reference answer as it stands, as data sets have it."""
    return attempt(replace(of, forms=of.forms[:1]), -1, right=True, characters=SOLUTION)


def attempt(of: Made, number: int, right: bool, seed: int = 0, characters: int = CHARACTERS) -> str:
    """One attempt: some reasoning, and its answer in a box; no two are the same text."""
    draw = random.Random(f"{seed} {of.question} {number}")
    steps = []
    while sum(map(len, steps)) < characters:
        one, other = draw.randint(1, 10**6), draw.randint(1, 10**6)
        steps.append(f"Then ${one} + {other} = {one + other}$, which we keep in mind. ")
    answer = draw.choice(of.forms if right else of.wrong)
    return f"{''.join(steps)}So the answer is \\boxed{{{answer}}}."
