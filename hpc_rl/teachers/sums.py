"""A rule teacher of sums: it judges attempts, writes new sums, and finds reference answers that are wrong.

"07+05=" is answered digit by digit, units first: "210". `services.teacher: {engine: rules, rules:
"hpc_rl.teachers.sums:teacher"}` serves it, and a run of the whole recipe needs no model but its solver. It reads the
same prompts as any other teacher, and what it says depends on them and on their seed alone.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence

from hpc_rl.teachers import enhancing, judging, references, sections

DIGITS = 3
POWERS = (1, 10, 100)
LARGEST = 99
MORE = 20
"""By how much larger than the old terms those of a harder sum are, at most."""
_QUESTION = re.compile(r"\s*(\d{2})\+(\d{2})=\s*")


def question(a: int, b: int) -> str:
    """How a sum is asked; terms are 0 to 99."""
    return f"{a:02d}+{b:02d}="


def answer(a: int, b: int) -> str:
    """How it is answered: units first."""
    return f"{a + b:0{DIGITS}d}"[::-1]


def parse(text: str) -> tuple[int, int] | None:
    """The terms that a question asks for; None for what is no sum."""
    found = _QUESTION.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def carries(a: int, b: int) -> int:
    """How many columns carry."""
    units = a % 10 + b % 10 > 9
    return int(units) + int(a // 10 + b // 10 + units > 9)


def teacher(messages: Sequence[Mapping[str, str]], seed: int) -> str:
    """What the teacher says to a prompt of `judging`, `references` or `enhancing`.

    Raises
    ------
    ValueError
        For another prompt, or for a question that is no sum.
    """
    told, shown = messages[0]["content"], sections.read(messages[1]["content"])
    if told == judging.SYSTEM:
        return _judge(shown[judging.REFERENCE], shown[judging.ATTEMPT])
    if told == references.SYSTEM:
        return _check(_terms(shown[references.QUESTION]), shown[references.REFERENCE])
    if told == enhancing.SYSTEM["harder"]:
        return _variant(harder(_terms(shown[enhancing.QUESTION]), random.Random(seed)))
    if told == enhancing.SYSTEM["targeted"]:
        terms = _terms(shown[enhancing.QUESTION])
        attempts = [text for title, text in shown.items() if title.startswith(enhancing.ATTEMPT)]
        return _variant(targeted(terms, attempts, random.Random(seed)))
    raise ValueError("this is no prompt of a grader or an enhancer")


def harder(terms: tuple[int, int], rng: random.Random) -> tuple[int, int]:
    """Other terms with at least as many carries, one more where they are large enough, and none smaller than before."""
    a, b = terms
    larger = [
        (c, d)
        for c in range(a, min(a + MORE, LARGEST) + 1)
        for d in range(b, min(b + MORE, LARGEST) + 1)
        if (c, d) != terms and carries(c, d) >= carries(a, b)
    ]
    if not larger:  # both are 99
        return rng.choice([(a, b - 1), (a - 1, b)])
    most = min(carries(a, b) + 1, max(carries(c, d) for c, d in larger))
    return rng.choice([(c, d) for c, d in larger if carries(c, d) >= most])


def targeted(terms: tuple[int, int], attempts: Sequence[str], rng: random.Random) -> tuple[int, int]:
    """Other terms of about that size that exercise the first column in which most attempts went wrong.

    A wrong column of units or tens gets digits that add up to the same; where it is the column that a carry goes into,
    the column before it carries too.
    """
    column = _failed_column(answer(*terms), attempts)
    a, b = terms
    near = [
        (c, d)
        for c in range(max(0, a - MORE), min(a + MORE, LARGEST) + 1)
        for d in range(max(0, b - MORE), min(b + MORE, LARGEST) + 1)
        if (c, d) != terms
    ]
    alike = [other for other in near if carried(other, column) == carried(terms, column)]
    same_digits = [(c, d) for c, d in alike if _column(c, d, column) == _column(a, b, column)]
    return rng.choice(same_digits or alike or near)


def carried(terms: tuple[int, int], column: int) -> int:
    """What is carried into a column; 0 is the units'."""
    a, b = terms
    return int(a % POWERS[column] + b % POWERS[column] >= POWERS[column])


def _column(a: int, b: int, column: int) -> int:
    return a // POWERS[column] % 10 + b // POWERS[column] % 10


def _failed_column(right: str, attempts: Sequence[str]) -> int:
    """The first wrong column of most attempts; the tens' where none of them is an answer at all."""
    wrong = [
        next(column for column in range(DIGITS) if said[column] != right[column])
        for said in (attempt.strip() for attempt in attempts)
        if len(said) == DIGITS and said.isdecimal() and said != right
    ]
    return max(range(DIGITS), key=lambda column: (wrong.count(column), -column)) if wrong else 1


def _judge(reference: str, attempt: str) -> str:
    right = attempt.strip() == reference.strip()
    reason = f"The attempt {'is' if right else 'is not'} {reference.strip()}."
    return json.dumps({"reason": reason, "correct": right})


def _check(terms: tuple[int, int], reference: str) -> str:
    said = answer(*terms)
    reason = f"{terms[0]} + {terms[1]} = {sum(terms)}, units first."
    return json.dumps({"reason": reason, "answer": said, "reference_correct": reference.strip() == said})


def _variant(terms: tuple[int, int]) -> str:
    said = answer(*terms)
    return enhancing.completion(enhancing.Variant(question(*terms), said, said))


def _terms(text: str) -> tuple[int, int]:
    found = parse(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no sum like {question(7, 5)!r}")
    return found
