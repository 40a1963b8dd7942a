"""Grading attempts of the solver (S2): the rule decides what it can, a teacher the rest, each different text once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from hpc_rl.data.questions import Question
from hpc_rl.grading.answers import Checker, Verdict
from hpc_rl.grading.samples import GradedSample

if TYPE_CHECKING:
    from hpc_rl.teachers import questions as teachers

Judge = Literal["unsure", "not_right", "never"]
GradedBy = Literal["rule", "teacher", ""]
Ask = Callable[[Sequence["teachers.Question"]], Sequence["teachers.Reply | teachers.TeacherError"]]


@dataclass(frozen=True)
class SolverGraded(GradedSample):
    """An attempt and whether it is right.

    Attributes
    ----------
    reward_correctness
        1 right, 0 wrong, None for an attempt that is left out; the only part of the reward.
    answer
        As the rule found it; None where it found none.
    graded_by
        `rule` or `teacher`; "" for what is left out.
    """

    reward_correctness: float | None
    answer: str | None
    graded_by: str


class Attempt(NamedTuple):
    """What is graded."""

    question: Question
    text: str
    cut_off: bool


class Grade(NamedTuple):
    """What came of it; `right` is None where the teacher gave no answer: left out, never counted as wrong."""

    right: bool | None
    answer: str | None
    graded_by: GradedBy


class Grader:
    """Grades attempts that come question by question.

    Parameters
    ----------
    checker
        The rule.
    judge
        Which attempts the teacher judges (`grade.judge`). An attempt that was cut off, or says nothing after its
        thoughts, is wrong without asking.
    ask
        `TeacherClient.ask_all`; None with `never`.
    """

    def __init__(self, checker: Checker, judge: Judge, ask: Ask | None) -> None:
        assert (ask is None) == (judge == "never"), "a judge that is never asked, or the other way round"
        self._checker, self._judge, self._ask = checker, judge, ask
        self._of, self._reference = "", checker.reference("")
        self._known: dict[tuple[str, bool], Grade] = {}

    def grade(self, attempts: Iterable[Attempt]) -> list[Grade]:
        """A grade for each, in order.

        Parameters
        ----------
        attempts
            Those of a question stand together; the last question may go on in the next call.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            From `ask`. Nothing is kept of these attempts then, except what the teacher's cache has.
        """
        found: list[Grade | None] = []
        waiting: dict[tuple[str, str], list[int]] = {}  # places in found by question and text
        asked: list[teachers.Question] = []
        answers: list[str | None] = []
        for place, (question, text, cut_off) in enumerate(attempts):
            if question.question_id != self._of:
                self._begin(question)
            known = self._known.get((text, cut_off))
            if known is None and (cut_off or (question.question_id, text) not in waiting):
                verdict = self._checker.verdict(self._reference, text, cut_off=cut_off)
                if not self._is_for_teacher(verdict, text, cut_off):
                    known = self._known[text, cut_off] = Grade(verdict.right is True, verdict.answer, "rule")
                else:
                    from hpc_rl.teachers import judging

                    asked.append(judging.ask(question.question, question.answer, text))
                    answers.append(verdict.answer)
            if known is None:
                waiting.setdefault((question.question_id, text), []).append(place)
            found.append(known)
        if asked:
            self._judged(asked, answers, waiting, found)
        assert None not in found
        return found  # type: ignore[return-value]

    def _begin(self, question: Question) -> None:
        self._of, self._reference = question.question_id, self._checker.reference(question.answer)
        self._known = {}

    def _is_for_teacher(self, verdict: Verdict, text: str, cut_off: bool) -> bool:
        if self._judge == "never" or verdict.right or cut_off or not text.rpartition("</think>")[2].strip():
            return False
        return verdict.right is None or self._judge == "not_right"

    def _judged(
        self, asked: list[teachers.Question], answers: list[str | None], waiting: dict[tuple[str, str], list[int]],
        found: list[Grade | None],
    ) -> None:  # fmt: skip
        from hpc_rl.teachers import judging
        from hpc_rl.teachers.questions import Reply

        assert self._ask is not None
        for ((of, text), places), answer, reply in zip(waiting.items(), answers, self._ask(asked), strict=True):
            right = judging.is_right(reply.value) if isinstance(reply, Reply) else None
            grade = Grade(right, answer, "" if right is None else "teacher")
            for place in places:
                found[place] = grade
            if of == self._of:
                self._known[text, False] = grade
