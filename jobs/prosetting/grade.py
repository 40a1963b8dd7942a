"""Job body of the grade stage: which attempts are right, by rule, and by a teacher where the rule cannot say.

The teacher is also asked about the reference answers of questions that no attempt solved (`grade.check_references`).
The shard is read and written in pieces. Columns that are only passed through, tokens above all, stay Arrow's.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.garbage import seldom_collected

if TYPE_CHECKING:
    from hpc_rl.data.questions import Question
    from hpc_rl.grading.solver import Grade, Grader
    from hpc_rl.teachers.client import TeacherClient

log = logging.getLogger("hpc_rl")

AT_ONCE = 16
"""Row groups in memory: enough attempts to keep the teacher busy."""
MOST_BYTES = 128 * 2**20
"""Their size, as long as it is more than one."""
EXPLAINED = 3
"""Reasons of a shard that are written to the log."""


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.grade --workspace W --round R`; 75 when no teacher answers (what is graded stays)."""
    job = open_job("grade", argv)
    config = job.config
    assert isinstance(config, ProSettingConfig)
    with ExitStack() as stack:
        teacher = None
        if config.grade.asks_teacher:
            from hpc_rl.teachers.client import TeacherClient

            teacher = stack.enter_context(TeacherClient.of_run(job.ws, config))
        stack.enter_context(seldom_collected())
        for shard in job.shards():
            grade(job, config, shard, teacher)
    return 0


def grade(job: Job, config: ProSettingConfig, shard: Shard, teacher: TeacherClient | None) -> None:
    """Grade the attempts of a shard, check the references of what is too hard, and commit both."""
    import pyarrow.parquet as pq

    from hpc_rl.data.questions import count_questions, iter_questions, shard_range
    from hpc_rl.grading.answers import Checker
    from hpc_rl.grading.broken import write_broken
    from hpc_rl.grading.reference_check import COUNTS, ReferenceCheck
    from hpc_rl.grading.results import ZONES, write_results
    from hpc_rl.grading.samples import ROWS, open_writer
    from hpc_rl.grading.solver import Grader, SolverGraded
    from hpc_rl.teachers.answered import iter_answered

    pool = job.input(job.round - 1, "pool", 0).path("questions.parquet")
    sampled = job.input(job.round, "collect", shard.index).path("samples.parquet")
    places = shard_range(count_questions(pool), job.stage.shards, shard.index)
    tally = _Tally(places, iter_questions(pool, places))
    before, began = _spent(teacher), time.monotonic()
    judge, checker = config.grade.judge, Checker(config.grade.answers)
    grader = Grader(checker, judge, None if teacher is None or judge == "never" else teacher.ask_all)
    graded, results = shard.output("graded.parquet"), shard.output("results.parquet")
    with pq.ParquetFile(sampled) as file, open_writer(graded, SolverGraded) as writer:
        total = file.metadata.num_rows
        shard.progress(0, total)
        for table in _pieces(file):
            piece, grades = _graded(table, tally, grader)
            tally.add(piece["group"].to_pylist(), grades)
            writer.write_table(piece, row_group_size=ROWS)
            tally.read += table.num_rows
            shard.progress(tally.read, total)
    write_results(results, tally.results())
    references = ReferenceCheck(checker, teacher, config.run.seed)
    if config.grade.check_references:
        hard, answered = tally.zones["too_hard"], iter_answered(pool, places, graded, results, wrong=0)
        references.check(answered, lambda done: shard.progress(total + done, total + hard))
    for why in references.reasons[:EXPLAINED]:
        log.warning("a reference answer is not checked: %s", why)
    broken = shard.output("broken.parquet")
    write_broken(broken, references.broken)
    counts, judged = tally.counts, tally.counts["right"] + tally.counts["wrong"]
    metrics = {
        "attempts": tally.read,
        **{name: counts[name] for name in ("samples", "right", "wrong", "left_out", "cut_off", "no_answer")},
        "mean_reward": round(counts["right"] / judged, 6) if judged else 0.0,
        "questions": len(places),
        **{f"zone_{zone}": tally.zones[zone] for zone in ZONES},
        "graded_by_rule": counts["by_rule"],
        "graded_by_teacher": counts["by_teacher"],
        **{name: references.counts[name] for name in COUNTS},
        "broken": len(references.broken),
        **{f"teacher_{name}": number - before[name] for name, number in _spent(teacher).items()},
        "grading_s": round(time.monotonic() - began, 2),
    }
    if counts["left_out"]:
        log.warning("%d of %d attempts are left out: the teacher gave no verdict", counts["left_out"], tally.read)
    shard.commit([graded, results, broken], made_from={"samples": sampled.name}, metrics=metrics)


class _Tally:
    """The questions of a shard as its attempts come, and what came of them."""

    def __init__(self, places: range, questions: Iterator[Question]) -> None:
        import numpy as np

        self._places, self._questions = places, questions
        self._at = places.start - 1
        self._question: Question | None = None
        self._ids: list[str] = []
        self._numbers = np.zeros((len(places), 3), np.int64)  # right, wrong, left out
        self.counts: Counter[str] = Counter()
        self.zones: Counter[str] = Counter()
        self.read = 0

    def question(self, place: int, row_id: str) -> Question:
        """The question at a place, which is not before the last one that was asked for."""
        while self._at < place and self._next():
            pass
        assert self._question is not None and (self._at, self._question.question_id) == (place, row_id), (
            f"an attempt at {row_id} says group {place}, but another question has this place in the pool"
        )
        return self._question

    def add(self, places: Sequence[int], grades: Sequence[Grade]) -> None:
        """Count grades of attempts at the questions of these places."""
        import numpy as np

        outcome = [2 if right is None else 0 if right else 1 for right, _, _ in grades]
        cells = (np.asarray(places, np.int64) - self._places.start) * 3 + np.asarray(outcome, np.int64)
        self._numbers += np.bincount(cells, minlength=self._numbers.size).reshape(self._numbers.shape)
        count, by = Counter(outcome), Counter(grade.graded_by for grade in grades)
        self.counts.update(
            samples=len(grades), right=count[0], wrong=count[1], left_out=count[2], by_rule=by["rule"],
            by_teacher=by["teacher"], no_answer=sum(grade.answer is None for grade in grades),
        )  # fmt: skip

    def results(self) -> Iterator[Any]:
        """A result for each question of the shard, also of those without attempts."""
        from hpc_rl.grading.results import result

        while self._next():
            pass
        for place, id, numbers in zip(self._places, self._ids, self._numbers.tolist(), strict=True):
            one = result(id, place, *numbers)
            self.zones[one.zone] += 1
            yield one

    def _next(self) -> bool:
        self._question = next(self._questions, None)
        if self._question is None:
            return False
        self._at += 1
        self._ids.append(self._question.question_id)
        return True


def _pieces(file: Any) -> Iterator[Any]:
    """Tables of a shard's attempts, some row groups each: of long attempts fewer."""
    groups: list[int] = []
    size = 0
    for group in range(file.num_row_groups):
        more = file.metadata.row_group(group).total_byte_size
        if groups and (len(groups) == AT_ONCE or size + more > MOST_BYTES):
            yield file.read_row_groups(groups)
            groups, size = [], 0
        groups.append(group)
        size += more
    if groups:
        yield file.read_row_groups(groups)


def _graded(table: Any, tally: _Tally, grader: Grader) -> tuple[Any, list[Grade]]:
    """The attempts of a piece that count, with what they are worth."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from hpc_rl.grading.samples import schema
    from hpc_rl.grading.solver import Attempt, SolverGraded

    if not pc.all(table["accepted"]).as_py():
        table = table.filter(table["accepted"])
    cut_off = pc.equal(table["finish_reason"], "length").to_pylist()
    named = zip(table["group"].to_pylist(), table["row_id"].to_pylist(), strict=True)
    grades = grader.grade(
        Attempt(tally.question(place, id), text, cut)
        for (place, id), text, cut in zip(named, table["text"].to_pylist(), cut_off, strict=True)
    )
    tally.counts["cut_off"] += sum(cut_off)
    rewards = [None if grade.right is None else float(grade.right) for grade in grades]
    added = {
        "reward": rewards,
        "left_out": [grade.right is None for grade in grades],
        "reward_correctness": rewards,
        "answer": [grade.answer for grade in grades],
        "graded_by": [grade.graded_by for grade in grades],
    }
    columns = schema(SolverGraded)
    arrays = [
        pa.array(added[field.name], field.type) if field.name in added else table[field.name] for field in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns), grades


def _spent(teacher: TeacherClient | None) -> dict[str, int]:
    """What the teacher has been asked so far."""
    names = ("calls", "answers", "errors", "prompt_tokens", "completion_tokens")
    totals = {} if teacher is None else asdict(teacher.totals)
    return {name: totals.get(name, 0) for name in names}


if __name__ == "__main__":
    sys.exit(main())
