"""The grader: who decides which attempt, in whatever pieces attempts come; and the zones of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.data.questions import Question
from hpc_rl.grading.answers import Checker
from hpc_rl.grading.results import ZONES, result, zone_of
from hpc_rl.grading.solver import Attempt, Grade, Grader
from hpc_rl.teachers import judging, sections
from hpc_rl.teachers.questions import Question as Asked
from hpc_rl.teachers.questions import Reply, TeacherError

BASE = Question("q1", "Which day?", "Monday", None, "q1", None, 0, "", "train", "initial")
QUESTIONS = [BASE, replace(BASE, question_id="q2", answer="5"), replace(BASE, question_id="q3")]
TEXTS = [r"\boxed{Monday}", r"\boxed{the first}", r"\boxed{silence}", r"\boxed{5}", r"\boxed{6}", "", "no idea"]


class Judge:
    """Calls right what says `first`; says nothing about `silence`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, questions: Sequence[Asked]) -> list[Reply | TeacherError]:
        return [self._answer(one) for one in questions]

    def _answer(self, question: Asked) -> Reply | TeacherError:
        shown = sections.read(question.messages[-1]["content"])
        self.asked.append((shown[judging.REFERENCE], shown[judging.ATTEMPT]))
        if "silence" in shown[judging.ATTEMPT]:
            return TeacherError("it says nothing")
        value = {"reason": "so", "correct": "first" in shown[judging.ATTEMPT]}
        return Reply("", value, "stop", 1, 1, False)


attempts_of_a_round = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(TEXTS), st.booleans()), max_size=24).map(
    lambda drawn: [Attempt(QUESTIONS[at], text, cut) for at, text, cut in sorted(drawn, key=lambda one: one[0])]
)


@settings(max_examples=80, deadline=None)
@given(attempts_of_a_round, st.sampled_from(["unsure", "not_right"]), st.integers(1, 24))
def test_grades_do_not_depend_on_the_pieces_and_nothing_is_asked_twice_s2(
    attempts: list[Attempt], judge: str, size: int
) -> None:
    whole, pieces = Judge(), Judge()
    expected = Grader(Checker("math"), judge, whole).grade(attempts)  # type: ignore[arg-type]
    grader = Grader(Checker("math"), judge, pieces)  # type: ignore[arg-type]
    found = [one for at in range(0, len(attempts), size) for one in grader.grade(attempts[at : at + size])]
    assert found == expected and pieces.asked == whole.asked
    questions = {attempt.question.question_id for attempt in attempts if attempt.question.answer == "Monday"}
    assert len(whole.asked) <= len(set(whole.asked)) * max(1, len(questions))
    for attempt, grade in zip(attempts, expected, strict=True):
        assert grade.right is not None or "silence" in attempt.text
        assert grade.graded_by == ("" if grade.right is None else grade.graded_by)
        if attempt.cut_off or not attempt.text:
            assert (grade.right, grade.graded_by) == (False, "rule")
        if grade.graded_by == "teacher":
            assert grade.right == ("first" in attempt.text)


def test_without_a_judge_what_the_rule_cannot_say_is_wrong() -> None:
    grader = Grader(Checker("math"), "never", None)
    attempts = [Attempt(BASE, text, False) for text in (r"\boxed{Monday}", r"\boxed{the first}", "no idea")]
    assert grader.grade(attempts) == [
        Grade(True, "Monday", "rule"), Grade(False, "the first", "rule"), Grade(False, None, "rule")
    ]  # fmt: skip


def test_a_judge_of_the_unsure_is_not_asked_about_what_is_wrong_by_rule() -> None:
    judge = Judge()
    grader = Grader(Checker("math"), "unsure", judge)
    assert grader.grade([Attempt(QUESTIONS[1], r"\boxed{6}, first", False)])[0] == Grade(False, "6", "rule")
    assert not judge.asked
    assert Grader(Checker("math"), "not_right", judge).grade([Attempt(QUESTIONS[1], r"\boxed{6}, first", False)]) == [
        Grade(True, "6", "teacher")
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "left_out", "rate", "zone"),
    [(8, 0, 0, 1.0, "mastered"), (1, 7, 0, 0.125, "learning"), (0, 8, 0, 0.0, "too_hard"), (0, 0, 8, None, "ungraded"),
     (0, 0, 0, None, "ungraded"), (3, 0, 5, 1.0, "mastered"), (0, 3, 5, 0.0, "too_hard")],
)  # fmt: skip
def test_zones_by_success_rate_s4(right: int, wrong: int, left_out: int, rate: float | None, zone: str) -> None:
    """S4: what is left out neither succeeds nor fails."""
    one = result("q1", 0, right, wrong, left_out)
    assert (one.attempts, one.success_rate, one.zone) == (right + wrong + left_out, rate, zone)


@given(st.integers(0, 50), st.integers(0, 50))
def test_every_question_is_in_one_zone(right: int, wrong: int) -> None:
    one = result("q1", 0, right, wrong, 0)
    assert zone_of(right, wrong) in ZONES
    assert (one.zone == "mastered") == (one.success_rate == 1)
    assert (one.zone == "too_hard") == (one.success_rate == 0)
    assert (one.zone == "learning") == (one.success_rate is not None and 0 < one.success_rate < 1)
