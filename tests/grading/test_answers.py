"""Answers checked by rule (S2): right and wrong where the rule can say, None where it cannot, and never a hang."""

from __future__ import annotations

import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.grading import formulas
from hpc_rl.grading.answers import Checker, Verdict
from hpc_rl.grading.extraction import answer_of

MATH, TEXT = Checker("math"), Checker("text")


def rule(reference: str, answer: str) -> bool | None:
    return MATH.verdict(MATH.reference(reference), rf"So it is \boxed{{{answer}}}.").right


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("72", "72"), ("72", "72.0"), ("1234", "1,234"), ("1,234", "1 234"), ("1234", r"1\,234"), ("18", r"\$18"),
        ("18", "$18.00"), ("-5", "\u22125"), ("007", "7"), ("1500", "1.5e3"), ("5", "5."),
        ("1/2", r"\frac12"), ("0.5", "1/2"), ("1/3", "0.333333"), (r"2\frac{1}{2}", "2.5"), ("2^{100}", str(2**100)),
        ("50", "50%"), ("0.5", r"50\%"), ("50%", "0.5"), ("50%", "50"),
        ("18", "18 dollars"), ("18", r"18\text{ dollars}"), ("5 dollar", "5 dollars"), ("18 cm^2", r"18\text{ cm}^2"),
        ("0.5", r"\frac{1}{2}\text{ hours}"), ("5", "5 m"), ("30", r"30^\circ"),
        (r"x^2+2x+1", "(x+1)^2"), (r"\sqrt{8}", r"2\sqrt{2}"), ("2xy", "2yx"), ("x=5", "5"), ("5", "x=5"),
        ("(1,2)", "(1, 2)"), (r"\{1,2\}", r"\{2,1\}"), ("[0,1)", "[0, 1)"),
        ("Monday", "monday"), ("Monday", r"\text{Monday}"), ("A", "(A)"), (r"\boxed{5}", "5"), ("$5$", "5"),
    ],
)  # fmt: skip
def test_the_same_in_another_form_is_right_s2(reference: str, answer: str) -> None:
    assert rule(reference, answer) is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("72", "73"), ("1/3", "0.33"), ("18", "-18"), ("50", "0.5%"), ("5", "5x"), ("5", r"\infty"), ("5 m", "6 m"),
        ("A", "B"), ("A", "(B)"),
        ("x^2", "x^3"), ("[0,1)", "[0,1]"), ("(1,2)", "(2,1)"), ("5", "9" * 250), ("1e400", "5"),
    ],
)  # fmt: skip
def test_another_value_is_wrong_s2(reference: str, answer: str) -> None:
    assert rule(reference, answer) is False


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("Monday", "on Monday"), ("dog", "god"), ("3 hours", "180 minutes"), ("3 hours", "3 minutes"),
        ("5 m", "5 s"), ("5 h", "5 s"), ("5 ms", "5 m"), ("A", "(A) 5"), ("A", "(B) 5"), ("A", "B. cats"),
        ("(A)", "A) 7"),
        (r"\Gamma", r"\gamma"), ("18", "eighteen"),
        ("18", "19 dollars"), ("5", r"\frac" * 50), ("5", "9" * 1000), ("", "5"), ("5", "{" * 140 + "1" + "}" * 140),
    ],
)  # fmt: skip
def test_words_and_what_does_not_parse_are_for_a_teacher_s2(reference: str, answer: str) -> None:
    """S2: math-verify alone would call a god a dog, since it reads products of letters, and a Gamma a gamma."""
    assert rule(reference, answer) is None


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"First \boxed{4}, no: \boxed{\frac{10}{2}}", r"\frac{10}{2}", True),
        (r"\boxed{\boxed{5}}", "5", True),
        (r"<think>It is \boxed{4}.</think> It is 5.", "5", True),
        (r"Here { is \boxed{5}", "5", True),
        ("Two and three.\n#### 5", "5", True),
        ("The final answer is: 5.0. I hope it is correct.", "5.0", True),
        ("**Answer:** $4$", "$4$", False),
        ("2 and 3 make 5", "5", True),
        ("2 and 3 make 6", "6", None),  # the last number need not be what it means
        (r"It is \boxed{5", "5", True),
        ("I do not know.", None, None),
        ("", None, False),
        (" \n", None, False),
    ],
)  # fmt: skip
def test_the_answer_is_found_in_a_completion(completion: str, answer: str | None, right: bool | None) -> None:
    assert MATH.verdict(MATH.reference("5"), completion) == Verdict(right, answer)


def test_what_is_cut_off_is_wrong_even_if_it_has_said_the_answer() -> None:
    assert MATH.verdict(MATH.reference("5"), r"\boxed{5} and then", cut_off=True) == Verdict(False, "5")


def test_texts_are_the_same_words() -> None:
    """`grade.answers: text`: case and spacing do not count, and the rule always can say."""
    reference = TEXT.reference("New  York")
    said = {" new york": True, "New York.": True, r"Surely \boxed{NEW YORK}": True, "newyork": False, "York": False}
    assert {text: TEXT.verdict(reference, text).right for text in said} == said
    assert TEXT.verdict(TEXT.reference("210"), "2 1 0").right is False
    assert TEXT.verdict(reference, "").right is False


def test_a_reference_says_whether_answers_to_it_can_be_checked() -> None:
    assert [MATH.reference(text).checkable for text in ("72", r"\frac{1}{2}", "Monday", "", "x +")] == [
        True, True, False, False, False
    ]  # fmt: skip
    assert [TEXT.reference(text).checkable for text in ("Monday", " ")] == [True, False]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "LIMIT_S", 0.1)


HOSTILE = [
    "10^{10^{10}}", "9^{9^{9^{9}}}", "(x+1)^{100000}", "100000000!", "((x^9)^9)^9" + "+1" * 40,
    "{1+" * 30 + "0" + "}" * 30, r"\int_0^1 " * 30, r"\sum_{n=1}^{10^9} n^n", "x" + "^2" * 100,
    r"\frac{1}{" * 15 + "2" + "}" * 15, "9" * 10_000, "-" * 300,
    "1/0", r"\boxed{" * 500, r"\left(" * 40, "\x00", "1,2,3," * 40, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_a_solver_writes_hangs_or_crashes_the_rule(hostile: str, impatient: None) -> None:
    """Without the time limit several of these take longer than a day."""
    for reference in ("5", hostile):
        for completion in (rf"\boxed{{{hostile}}}", f"The answer is {hostile}", hostile):
            assert MATH.verdict(MATH.reference(reference), completion).right in (True, False, None)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("0123456789x+-*/^{}()[]\\,.=$%!<> boxedfrac\n"), max_size=60))
def test_any_text_has_a_verdict_and_the_same_words_are_never_wrong(text: str) -> None:
    verdict = MATH.verdict(MATH.reference(text), rf"\boxed{{{text}}}")
    found, how = answer_of(rf"\boxed{{{text}}}")
    if how == "boxed" and found == text.strip() and MATH.reference(text).words:
        assert verdict.right is True
    assert MATH.verdict(MATH.reference("5"), text).right in (True, False, None)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_whole_numbers_are_right_exactly_when_they_are_equal(one: int, other: int) -> None:
    assert rule(str(one), f"{other:,}") is (one == other)
    assert rule(str(one), f"{one:,}.00") is True


def test_the_time_limit_gives_back_somebody_elses_timer() -> None:
    """A profiler's, say. It counts CPU time, so a busy machine changes no verdict."""
    rang: list[int] = []
    handler = signal.signal(signal.SIGPROF, lambda number, frame: rang.append(number))
    signal.setitimer(signal.ITIMER_PROF, 300)
    try:
        assert rule("x^2+2x+1", "(x+1)^2") is True
        assert 0 < signal.getitimer(signal.ITIMER_PROF)[0] < 301 and not rang
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def test_in_another_thread_there_is_no_time_limit_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """`--executor debug` runs job bodies in threads, and signals come to the main one only."""
    formulas._say_that_there_is_no_limit.cache_clear()
    said: list[object] = []

    def check() -> None:
        said.extend([rule("5", "6"), rule("x^2+1", "1+x^2"), rule("x^2", "x^3")])

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert said == [False, True, False]
    assert caplog.text.count("no time limit on answers") == 1
