"""New questions from those that were answered (S3, S4): by a rule teacher over HTTP, real jobs, attempts by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.data.questions import Question
from hpc_rl.grading.answers import Checker
from hpc_rl.grading.reference_check import ReferenceCheck
from hpc_rl.run.workspace import Workspace
from hpc_rl.teachers import enhancing, judging, references, sections, sums
from hpc_rl.teachers.answered import Answered
from hpc_rl.teachers.questions import Reply
from jobs.prosetting import enhance, grade
from tests.jobs.listening import arguments
from tests.jobs.solver_round import attempts_at, by_rules, metrics, new_round, pool, service, tables, zone_of
from tests.teachers.server import Misbehave, Teacher

RULES = {"engine": "rules", "rules": "hpc_rl.teachers.sums:teacher", "batch_wait_ms": 0, "idle_timeout_s": 60}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A round that was graded by the rule alone; one teacher of its own checks references, another one enhances."""
    sections = {"services": {"teacher": RULES, "enhancer": RULES}, "enhance": {"teacher": "enhancer"}}
    ws = new_round(tmp_path_factory.mktemp("round"), grade={"answers": "text", "judge": "never"}, **sections)
    with service(ws, "grade.teacher"):
        assert grade.main(arguments(ws)) == 0
    with service(ws, "enhance.enhancer"):
        assert enhance.main(arguments(ws)) == 0
    return ws


Taught = Callable[..., tuple[Workspace, Teacher]]


@pytest.fixture
def taught() -> Iterator[Taught]:
    """Rounds whose teacher is an endpoint of its own, which follows the rules until told otherwise."""
    made: list[Teacher] = []

    def make(root: Path, failures_shown: int = 3, **sections: Any) -> tuple[Workspace, Teacher]:
        made.append(Teacher())
        made[-1].right = by_rules
        client = {"url": made[-1].url, "backoff_factor": 0.01, "max_retries": 1, "structured": "none"}
        services = {"teacher": {"client": client}}
        return new_round(root, services=services, enhance={"failures_shown": failures_shown}, **sections), made[-1]

    yield make
    for teacher in made:
        teacher.die()


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
    broken = {row["question_id"]: row for row in tables(done, "grade")["broken"].to_pylist()}
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
    assert (counted["asked"], counted["enhanced"]) == (12, 12)
    dropped = [name for name in counted if name.startswith("dropped")]
    assert len(dropped) == 5 and not any(counted[name] for name in dropped)
    checked = metrics(done, "grade")
    assert (checked["checked_references"], checked["broken"], checked["graded_by_teacher"]) == (8, 4, 0)
    assert checked["unchecked_references"] == checked["contradictions"] == 0
    for made, calls in ((counted, 12), (checked, 8)):
        assert (made["teacher_calls"], made["teacher_answers"], made["teacher_errors"]) == (calls, calls, 0)
        assert made["teacher_completion_tokens"] > 0


def test_the_teacher_sees_what_went_wrong_and_what_most_attempts_said(tmp_path: Path, taught: Taught) -> None:
    """S4: targeted variants come with their failed attempts, checks of references with the most frequent answer."""
    ws, teacher = taught(tmp_path, failures_shown=2)
    assert grade.main(arguments(ws)) == enhance.main(arguments(ws)) == 0
    shown = {}
    for body in teacher.bodies:
        told, asked = (message["content"] for message in body["messages"])
        shown[told, sections.read(asked)["Question"]] = (sections.read(asked), body)
    for question in pool(ws):
        zone, attempts = zone_of(question), attempts_at(question)
        kind = {"mastered": "harder", "learning": "targeted", "forgotten": "targeted"}.get(zone)
        asked, body = shown.pop((enhancing.SYSTEM[kind], question.question), (None, {})) if kind else (None, {})
        if zone == "mastered":
            assert asked == {"Question": question.question, "Answer": question.answer, "Solution": question.solution}
        if kind == "targeted":
            wrong = [asked[f"Wrong attempt {n}"] for n in (1, 2)]
            assert wrong == list(dict.fromkeys(text for text in attempts if text.strip() != question.answer))[:2]
            assert "Wrong attempt 3" not in asked
            assert (body["temperature"], body["max_tokens"]) == (0.7, 4096)
        if zone in ("too_hard", "broken"):
            asked, body = shown.pop((references.SYSTEM, question.question))
            assert asked["Most frequent answer of the model"] == attempts[0]
            assert body["temperature"] == 0.0
    assert all(told == judging.SYSTEM for told, _ in shown), "nothing was asked about an ungraded question"


def test_what_cannot_be_used_is_dropped_and_counted_by_its_reason(tmp_path: Path, taught: Taught) -> None:
    """S3: a bad reply is retried, then dropped and counted; the others stand."""
    ws, teacher = taught(tmp_path, grade={"answers": "math", "judge": "not_right"})
    replies: dict[str, Any] = {}
    variant = {"enhanced_question": "1 + 1?", "solution": "2", "answer": "2"}
    finding = {"reason": "so", "answer": "5", "reference_correct": False}
    bad: list[tuple[str, Any]] = [
        ("dropped_bad_reply", "I would rather not"),
        ("dropped_bad_reply", {**variant, "answer": " "}),
        ("dropped_bad_reply", {**variant, "solution": "It is 2.<eos>"}),  # the solver's control token
        ("dropped_same", "itself"),
        ("dropped_unreadable", {**variant, "answer": "about the same as before"}),
        ("dropped_contradictory", {**variant, "solution": r"It is \boxed{3}."}),
        ("dropped_unanswered", Misbehave(400)),
    ]
    mastered, hard = of_zones(ws, "mastered", "learning"), of_zones(ws, "too_hard")
    for question, (_, reply) in zip(mastered, bad, strict=False):
        replies[question.question] = {**variant, "enhanced_question": question.question} if reply == "itself" else reply
    replies[hard[0].question] = {**finding, "answer": hard[0].answer}
    replies[hard[1].question] = Misbehave(500)
    replies[hard[2].question] = {**finding, "answer": " "}

    def behave(call: int, body: dict[str, Any]) -> Any:
        told, asked = (message["content"] for message in body["messages"][:2])
        reply = replies.get(sections.read(asked)["Question"]) if told != judging.SYSTEM else None
        return json.dumps(reply) if isinstance(reply, dict) else reply

    teacher.behave = behave
    assert grade.main(arguments(ws)) == enhance.main(arguments(ws)) == 0
    counted = metrics(ws, "enhance")
    assert {name: counted[name] for name, _ in bad} == Counter(name for name, _ in bad)
    assert (counted["asked"], counted["enhanced"]) == (12, 12 - len(bad))
    checked = metrics(ws, "grade")
    assert (checked["contradictions"], checked["unchecked_references"]) == (1, 2)
    assert (checked["checked_references"], checked["broken"]) == (6, 4)
    parents = tables(ws, "enhance")["enhanced"]["parent_id"].to_pylist()
    assert not set(parents) & {question.question_id for question, _ in zip(mastered, bad, strict=False)}
    assert counted["teacher_bad_replies"] == 12  # the first four of `bad`, in three tries each


@pytest.mark.parametrize(
    "answer",
    ["2/3", "x^2+1", r"\frac{2}{3}", "(1, 2)", r"\sqrt{2}", "3:45", "Paris", "no solution", "A", r"\boxed{7}", "{1, 2"],
)
def test_a_reference_that_is_called_wrong_in_favour_of_itself_stays(answer: str) -> None:
    """S4: compared as answers; of a completion the last number would be taken."""
    said = {"reason": "so", "answer": answer, "reference_correct": False}
    hard = Answered(Question("q1", "?", answer, None, "q1", None, 0, "", "train", "initial"), "too_hard", (), None)

    class Says:
        def ask_all(self, questions: Any, progress: Any) -> list[Reply]:
            return [Reply("", said, "stop", 0, 0, False) for _ in questions]

    check = ReferenceCheck(Checker("math"), Says(), 3)  # type: ignore[arg-type]
    check.check([hard], lambda done: None)
    assert (check.counts["contradictions"], check.broken) == (1, [])
    said["answer"] = "17"
    check.check([hard], lambda done: None)
    assert [one.suggested_answer for one in check.broken] == ["17"]
