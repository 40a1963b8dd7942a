"""Job body of the enhance stage: a teacher writes new questions from those that were answered.

    mastered → a harder variant      learning → a variant aimed at what went wrong

What the teacher is asked depends on the question, its attempts and the round: a shard that is done again asks the same,
and finds in the cache what was answered before.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.data.control_tokens import ControlTokens
from hpc_rl.data.questions import Question, count_questions, shard_range, write_questions
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.seeds import derive

if TYPE_CHECKING:
    from hpc_rl.grading.answers import Checker, Reference
    from hpc_rl.teachers import questions as asking
    from hpc_rl.teachers.answered import Answered
    from hpc_rl.teachers.client import TeacherClient
    from hpc_rl.teachers.enhancing import Kind

log = logging.getLogger("hpc_rl")

AT_ONCE = 2048
"""Questions whose prompts and answers are in memory together."""
KINDS: Mapping[str, Kind] = {"mastered": "harder", "learning": "targeted"}
"""Zone → what its variants are for (S4)."""
EXPLAINED = 3
"""Reasons of a shard that are written to the log."""
COUNTS = (
    "asked", "enhanced", "dropped_bad_reply", "dropped_same", "dropped_unreadable", "dropped_contradictory",
    "dropped_unanswered",
)  # fmt: skip
"""Questions that a variant was asked of, and what came of it: `enhanced` and the dropped ones add up to `asked`.
`dropped_unreadable`: the rule that compares answers makes nothing of the new one.
`dropped_contradictory`: its solution ends in another answer. `dropped_unanswered`: calls failed."""


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.enhance --workspace W --round R`; 75 when no teacher answers (answers are kept)."""
    job = open_job("enhance", argv)
    from hpc_rl.teachers.client import TeacherClient

    config = job.config
    assert isinstance(config, ProSettingConfig)
    with TeacherClient.of_run(job.ws, config, service=config.enhance.teacher) as teacher:
        for shard in job.shards():
            enhance(job, config, shard, teacher)
    return 0


def enhance(job: Job, config: ProSettingConfig, shard: Shard, teacher: TeacherClient) -> None:
    """Ask about the questions of a shard, and commit what came of it."""
    from hpc_rl.grading.answers import Checker
    from hpc_rl.teachers.answered import iter_answered

    questions = job.input(job.round - 1, "pool", 0).path("questions.parquet")
    grades = job.input(job.round, "grade", shard.index)
    places = shard_range(count_questions(questions), job.stage.shards, shard.index)
    graded, results = grades.path("graded.parquet"), grades.path("results.parquet")
    answered = iter_answered(questions, places, graded, results, wrong=config.enhance.failures_shown)
    work = Work(job, config, shard, teacher, Checker(config.grade.answers), total=len(places))
    before = teacher.totals
    variants = shard.output("enhanced.parquet")
    write_questions(variants, work.variants(answered))
    for why in work.reasons[:EXPLAINED]:
        log.warning("left out: %s", why)
    metrics = {**{name: work.counts[name] for name in COUNTS}, **teacher.totals.metrics(since=before)}
    shard.commit([variants], made_from={"graded": graded.name}, metrics=metrics)


class Work:
    """Asks about the questions of a shard.

    Attributes
    ----------
    counts
        As `COUNTS` says.
    reasons
        Why questions were left out.
    """

    def __init__(
        self, job: Job, config: ProSettingConfig, shard: Shard, teacher: TeacherClient, checker: Checker, total: int
    ) -> None:
        self._job, self._config, self._shard, self._teacher = job, config, shard, teacher
        self._checker, self._total, self._done = checker, total, 0
        self._has_control_token = ControlTokens(Path(config.solver.path)).are_in
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []

    def variants(self, answered: Iterator[Answered]) -> Iterator[Question]:
        """New questions, in the order of those that they come from."""
        while some := list(islice(answered, AT_ONCE)):
            asked = [(one, self._ask(one)) for one in some if one.zone in KINDS]
            replies = self._teacher.ask_all(
                [question for _, question in asked],
                lambda done, of: self._shard.progress(self._done + done * len(some) // of, self._total),
            )
            for (one, _), reply in zip(asked, replies, strict=True):
                if (variant := self._variant(one, reply)) is not None:
                    yield variant
            self._done += len(some)

    def _ask(self, one: Answered) -> asking.Question:
        """What the teacher is asked for a variant of a question."""
        from hpc_rl.teachers import enhancing

        question, options, seed = one.question, self._config.enhance, self._config.run.seed
        kind = KINDS[one.zone]
        attempts = one.wrong if kind == "targeted" else ()
        chat = enhancing.messages(kind, question.question, question.answer, question.solution, attempts)
        return enhancing.ask(
            chat, question.question, seed=derive(seed, "enhance", self._job.round, question.question_id),
            temperature=options.temperature, max_tokens=options.max_tokens, has_control_token=self._has_control_token,
        )  # fmt: skip

    def _variant(self, one: Answered, reply: asking.Reply | asking.TeacherError) -> Question | None:
        """The variant in a reply, or None and the reason counted."""
        from hpc_rl.teachers import enhancing
        from hpc_rl.teachers.questions import TeacherError

        parent = one.question
        self.counts["asked"] += 1
        if isinstance(reply, TeacherError):
            last = None if reply.value is None else enhancing.read(reply.value)
            fault = "" if last is None else enhancing.fault(last, parent.question, self._has_control_token)
            kind = "same" if fault == enhancing.SAME else "bad_reply" if reply.bad_reply else "unanswered"
            self._drop(f"dropped_{kind}", parent, reply.message)
            return None
        variant = enhancing.read(reply.value)
        own, old = self._checker.reference(variant.answer), self._checker.reference(parent.answer)
        if not own.words or (old.checkable and not own.checkable):
            self._drop("dropped_unreadable", parent, f"the answer of its variant is {variant.answer[:80]!r}")
            return None
        if self._contradicts(own, variant.solution):
            self._drop("dropped_contradictory", parent, f"the solution of its variant is not {variant.answer[:80]!r}")
            return None
        self.counts["enhanced"] += 1
        return Question(
            question_id=f"{parent.question_id}.r{self._job.round:02d}",
            question=variant.question,
            answer=variant.answer,
            solution=variant.solution,
            root_id=parent.root_id,
            parent_id=parent.question_id,
            made_in=self._job.round,
            kind=KINDS[one.zone],
            split=parent.split,
            reason="enhanced",
        )

    def _contradicts(self, answer: Reference, solution: str) -> bool:
        """Whether a solution states another final answer; one that states none may be anything."""
        from hpc_rl.grading.extraction import answer_of

        _, how = answer_of(solution, whole=self._checker.answers == "text")
        return how in ("boxed", "said") and self._checker.verdict(answer, solution).right is False

    def _drop(self, count: str, question: Question, why: str) -> None:
        self.counts[count] += 1
        self.reasons.append(f"{question.question_id}: {why}")


if __name__ == "__main__":
    sys.exit(main())
