"""Graphs: what a recipe may not declare, and the chain of advance stages that every run has."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from hpc_rl.orchestrate.graph import ADVANCE, Graph, Kind, Stage, StageId, build_graph


def single(round: int, name: str, *needs: StageId) -> Stage:
    return Stage(StageId(round, name), f"jobs.{name}", Kind.SINGLE, needs=needs)


def two_stages(round: int) -> Iterable[Stage]:
    yield single(round, "sample", *([StageId(round - 1, "train")] if round else []))
    yield single(round, "train", StageId(round, "sample"))


def test_a_stage_must_follow_stages_that_are_declared_before_it() -> None:
    with pytest.raises(ValueError, match=r"round 1 train follows round 1 sampel, which the recipe does not declare"):
        Graph((single(1, "train", StageId(1, "sampel")),), 1)


def test_stages_cannot_wait_for_each_other() -> None:
    with pytest.raises(ValueError, match="round 1 a follows round 1 b"):
        Graph((single(1, "a", StageId(1, "b")), single(1, "b", StageId(1, "a"))), 1)


def test_a_service_that_is_used_must_be_declared_too() -> None:
    grade = Stage(StageId(1, "grade"), "jobs.lewis.grade", Kind.SINGLE, uses=(StageId(1, "grade.listener"),))
    with pytest.raises(ValueError, match=r"round 1 grade follows round 1 grade\.listener"):
        Graph((grade,), 1)


def test_a_service_that_runs_beside_its_consumer_must_be_declared_too_and_has_no_job_of_its_own() -> None:
    listener = StageId(1, "grade.listener")
    grade = Stage(StageId(1, "grade"), "jobs.lewis.grade", Kind.SINGLE, beside=(listener,))
    with pytest.raises(ValueError, match=r"round 1 grade follows round 1 grade\.listener"):
        Graph((grade,), 1)
    service = Stage(listener, "jobs.serve", Kind.SERVICE, shards=0, serves=(grade.id,))
    assert Graph((service, grade), 1).companions == {listener}


def test_a_stage_is_declared_once() -> None:
    with pytest.raises(ValueError, match="declares round 1 a twice"):
        Graph((single(1, "a"), single(1, "a")), 1)


def test_every_round_ends_with_an_advance_and_one_more_waits_behind_the_last() -> None:
    graph = build_graph(2, two_stages)
    assert [str(stage.id) for stage in graph.stages] == [
        *(f"round {r} {name}" for r in range(3) for name in ("sample", "train", ADVANCE)),
        f"round 3 {ADVANCE}",
    ]
    assert graph[StageId(1, ADVANCE)].needs == (StageId(1, "sample"), StageId(1, "train"), StageId(0, ADVANCE))
    assert graph[StageId(3, ADVANCE)].needs == (StageId(2, ADVANCE),)


def test_an_advance_waits_for_work_but_not_for_services() -> None:
    served = StageId(0, "grade")
    listener = Stage(StageId(0, "grade.listener"), "jobs.serve", Kind.SERVICE, shards=0, serves=(served,))
    grade = Stage(served, "jobs.lewis.grade", Kind.SINGLE, uses=(listener.id,))
    graph = build_graph(0, lambda round: (listener, grade))
    assert graph[StageId(0, ADVANCE)].needs == (served,)
    assert graph.work == (grade,)


def test_a_round_may_be_empty() -> None:
    graph = build_graph(1, lambda round: () if round == 0 else (single(1, "a"),))
    assert [stage.name for stage in graph.of_round(0)] == [ADVANCE]
