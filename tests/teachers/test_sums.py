"""The rule teacher of sums says what is true of every sum, in the same words to the same prompt (S2, S3, S4)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.teachers import enhancing, judging, references, sums
from hpc_rl.teachers.questions import Question

TERMS = st.tuples(st.integers(0, sums.LARGEST), st.integers(0, sums.LARGEST))
WRONG = ("000", "12", "", "nine", "0099")


def said(question: Question) -> Any:
    assert sums.teacher(question.messages, question.seed or 0) == sums.teacher(question.messages, question.seed or 0)
    return json.loads(sums.teacher(question.messages, question.seed or 0))


def variant(kind: enhancing.Kind, a: int, b: int, seed: int, attempts: tuple[str, ...] = ()) -> tuple[int, int]:
    asked = sums.question(a, b)
    chat = enhancing.messages(kind, asked, sums.answer(a, b), sums.answer(a, b), attempts)
    how: dict[str, Any] = {"temperature": 0.7, "max_tokens": 100, "has_control_token": lambda text: False}
    made = enhancing.read(said(enhancing.ask(chat, asked, seed=seed, **how)))
    assert not enhancing.fault(made, asked, how["has_control_token"])
    terms = sums.parse(made.question)
    assert terms is not None and made.answer == made.solution == sums.answer(*terms)
    return terms


def test_a_sum_is_asked_in_order_and_answered_units_first() -> None:
    assert (sums.question(7, 5), sums.answer(7, 5), sums.parse(" 07+05=\n")) == ("07+05=", "210", (7, 5))
    assert (sums.answer(99, 99), sums.parse("7+5="), sums.parse("07+05=12")) == ("891", None, None)
    assert [sums.carries(*terms) for terms in ((11, 22), (7, 5), (60, 50), (99, 1))] == [0, 1, 1, 2]


@given(TERMS, st.sampled_from(WRONG))
def test_an_attempt_is_right_if_it_is_the_reference(terms: tuple[int, int], wrong: str) -> None:
    asked, right = sums.question(*terms), sums.answer(*terms)
    assert judging.is_right(said(judging.ask(asked, right, f" {right}\n")))
    assert judging.is_right(said(judging.ask(asked, right, wrong))) == (wrong == right)


@given(TERMS, st.sampled_from(WRONG), st.none() | st.just("210"))
def test_a_reference_is_wrong_if_it_is_not_the_sum(terms: tuple[int, int], wrong: str, frequent: str | None) -> None:
    asked, right = sums.question(*terms), sums.answer(*terms)
    assert references.read(said(references.ask(asked, right, frequent, seed=1))).correct
    finding = references.read(said(references.ask(asked, wrong, frequent, seed=1)))
    assert (finding.correct, finding.answer) == (wrong == right, right)


@given(TERMS, st.integers(0, 99))
def test_a_harder_sum_is_larger_and_carries_no_less_often(terms: tuple[int, int], seed: int) -> None:
    harder = variant("harder", *terms, seed)
    assert max(harder) <= sums.LARGEST
    if terms != (99, 99):
        assert harder[0] >= terms[0] and harder[1] >= terms[1]
        assert sums.carries(*harder) >= sums.carries(*terms)


def test_a_sum_without_a_carry_becomes_one_with_a_carry() -> None:
    assert all(sums.carries(*variant("harder", 12, 34, seed)) > 0 for seed in range(20))


@settings(max_examples=40)
@given(TERMS, st.integers(0, 99))
def test_a_sum_whose_carry_was_forgotten_becomes_another_with_the_same_carry(terms: tuple[int, int], seed: int) -> None:
    a, b = terms
    units = a % 10 + b % 10
    forgotten = f"{units % 10}{(a // 10 + b // 10) % 10}{(a // 10 + b // 10) // 10}"
    other = variant("targeted", a, b, seed, (forgotten, "what?"))
    assert other != terms and max(other) <= sums.LARGEST
    if units > 9:
        assert other[0] % 10 + other[1] % 10 > 9


@given(TERMS, st.lists(st.text(max_size=5), max_size=4))
def test_whatever_was_attempted_there_is_a_variant(terms: tuple[int, int], attempts: list[str]) -> None:
    other = sums.targeted(terms, attempts, random.Random(0))
    assert other != terms and all(0 <= term <= sums.LARGEST for term in other)


def test_variants_differ_by_seed() -> None:
    assert len({variant("harder", 12, 34, seed) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("question", "why"),
    [
        (Question(({"role": "user", "content": "hi"},) * 2), "no prompt of a grader"),
        (references.ask("What is 2 + 3?", "5", None, 0), "is no sum like '07\\+05='"),
    ],
    ids=["another prompt", "another question"],
)
def test_what_it_does_not_understand_has_no_answer(question: Question, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sums.teacher(question.messages, 0)
