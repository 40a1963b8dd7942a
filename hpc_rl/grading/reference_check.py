"""Finding broken reference answers (S4): a teacher is asked about the questions that no attempt solved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from hpc_rl.data.questions import Question
from hpc_rl.grading.answers import Checker
from hpc_rl.grading.broken import Broken
from hpc_rl.run.seeds import derive

if TYPE_CHECKING:
    from hpc_rl.teachers import questions as asking
    from hpc_rl.teachers.answered import Answered
    from hpc_rl.teachers.client import TeacherClient

AT_ONCE = 2048
"""Questions whose prompts and answers are in memory together."""
COUNTS = ("checked_references", "unchecked_references", "contradictions")


class ReferenceCheck:
    """Asks a teacher about the reference answers of a shard's questions.

    Parameters
    ----------
    checker
        Compares answers.
    teacher
        Who is asked; None where `check` is never called.
    run_seed
        `run.seed`.

    Attributes
    ----------
    counts
        As `COUNTS` says. `unchecked_references`: nobody gave an answer of use; they stay. `contradictions`: called
        wrong in favour of the same answer; they stay.
    broken
        So far.
    reasons
        Why references are unchecked.
    """

    def __init__(self, checker: Checker, teacher: TeacherClient | None, run_seed: int) -> None:
        self._checker, self._teacher, self._run_seed = checker, teacher, run_seed
        self.counts: Counter[str] = Counter()
        self.broken: list[Broken] = []
        self.reasons: list[str] = []

    def check(self, answered: Iterable[Answered], progress: Callable[[int], None]) -> None:
        """Ask about the questions of these that are too hard; `progress` is told how many are done.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            See `TeacherClient.ask_all`.
        """
        hard, before = (one for one in answered if one.zone == "too_hard"), 0
        while some := list(islice(hard, AT_ONCE)):
            self._check(some, before, progress)
            before += len(some)

    def _check(self, some: Sequence[Answered], before: int, progress: Callable[[int], None]) -> None:
        assert self._teacher is not None
        replies = self._teacher.ask_all([self._ask(one) for one in some], lambda done, _: progress(before + done))
        for one, reply in zip(some, replies, strict=True):
            self._note(one.question, reply)

    def _ask(self, one: Answered) -> asking.Question:
        from hpc_rl.teachers import references

        question = one.question
        seed = derive(self._run_seed, "reference", question.question_id)
        return references.ask(question.question, question.answer, one.frequent, seed)

    def _note(self, question: Question, reply: asking.Reply | asking.TeacherError) -> None:
        """Whether a reference answer is broken; not without a clear answer."""
        from hpc_rl.teachers import references
        from hpc_rl.teachers.questions import TeacherError

        if isinstance(reply, TeacherError):
            self.counts["unchecked_references"] += 1
            self.reasons.append(f"{question.question_id}: {reply.message}")
            return
        self.counts["checked_references"] += 1
        finding = references.read(reply.value)
        if finding.correct:
            return
        if self._is_same(question.answer, finding.answer):
            self.counts["contradictions"] += 1
            return
        self.broken.append(Broken(question.question_id, finding.reason, finding.answer))

    def _is_same(self, reference: str, answer: str) -> bool:
        """Whether two answers are the same; in a box, for a completion's answer would be searched for in its text."""
        known = self._checker.reference(reference)
        if known.words == self._checker.reference(answer).words:
            return True
        return self._checker.verdict(known, rf"\boxed{{{answer}}}").right is True
