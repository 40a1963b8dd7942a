"""New questions from those that were answered (S3, S4): by a rule teacher over HTTP, real jobs, attempts by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from hpc_rl.data.questions import Question
from hpc_rl.run.workspace import Workspace
from hpc_rl.teachers import sums
from jobs.prosetting import enhance, grade
from tests.jobs.listening import arguments
from tests.jobs.solver_round import metrics, new_round, pool, service, tables, zone_of

RULES = {"engine": "rules", "rules": "hpc_rl.teachers.sums:teacher", "batch_wait_ms": 0, "idle_timeout_s": 60}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A round that was graded and enhanced, by two teachers of its own."""
    services = {"teacher": RULES, "enhancer": RULES}
    enhance_options = {"teacher": "enhancer", "failures_shown": 2}
    ws = new_round(tmp_path_factory.mktemp("round"), services=services, enhance=enhance_options)
    with service(ws, "grade.teacher"):
        assert grade.main(arguments(ws)) == 0
    with service(ws, "enhance.enhancer"):
        assert enhance.main(arguments(ws)) == 0
    return ws


def of_zones(ws: Workspace, *zones: str) -> list[Question]:
    return [question for question in pool(ws) if zone_of(question) in zones]


def test_mastered_questions_become_harder_and_learnt_ones_targeted(done: Workspace) -> None:
    """S4: the zone says what a variant is for; S3: it is complete, and its answer is right."""
    variants = [Question(**row) for row in tables(done, "enhance")["enhanced"].to_pylist()]
    parents = of_zones(done, "mastered", "learning", "forgotten")
    assert [variant.parent_id for variant in variants] == [parent.question_id for parent in parents]
    for variant, parent in zip(variants, parents, strict=True):
        assert variant.kind == ("harder" if zone_of(parent) == "mastered" else "targeted")
        terms, before = sums.parse(variant.question), sums.parse(parent.question)
        assert terms is not None and before is not None and terms != before
        assert variant.answer == variant.solution == sums.answer(*terms)
        if variant.kind == "harder":
            assert sums.carries(*terms) >= sums.carries(*before) and sum(terms) > sum(before)


def test_a_variant_says_where_it_comes_from_and_stays_on_its_side_of_the_split(done: Workspace) -> None:
    parents = {question.question_id: question for question in pool(done)}
    variants = [Question(**row) for row in tables(done, "enhance")["enhanced"].to_pylist()]
    for variant in variants:
        parent = parents[str(variant.parent_id)]
        assert variant.question_id == f"{parent.question_id}.r01"
        assert (variant.root_id, variant.split) == (parent.root_id, parent.split)
        assert (variant.made_in, variant.reason) == (1, "enhanced")
    assert {variant.split for variant in variants} == {"train", "validation"}


def test_references_are_checked_where_no_attempt_was_right_and_the_broken_ones_are_named(done: Workspace) -> None:
    """S4: of the questions that are too hard, those with a wrong reference answer are found."""
    broken = {row["question_id"]: row for row in tables(done, "enhance")["broken"].to_pylist()}
    assert list(broken) == [question.question_id for question in of_zones(done, "broken")]
    for question in of_zones(done, "broken"):
        terms = sums.parse(question.question)
        assert terms is not None
        assert broken[question.question_id]["suggested_answer"] == sums.answer(*terms)
        assert f"{terms[0]} + {terms[1]}" in broken[question.question_id]["why"]


def test_what_was_asked_and_what_came_of_it_adds_up(done: Workspace) -> None:
    zones = Counter(tables(done, "grade")["results"]["zone"].to_pylist())
    assert zones == {"mastered": 4, "learning": 8, "too_hard": 8, "ungraded": 4}
    counted = metrics(done, "enhance")
    assert (counted["asked"], counted["enhanced"], counted["checked_references"], counted["broken"]) == (12, 12, 8, 4)
    dropped = [name for name in counted if name.startswith(("dropped", "unchecked", "contradictions"))]
    assert len(dropped) == 6 and not any(counted[name] for name in dropped)
    assert (counted["teacher_calls"], counted["teacher_answers"], counted["teacher_errors"]) == (20, 20, 0)
    assert counted["teacher_completion_tokens"] > 0
