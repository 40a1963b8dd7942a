"""How often a stage is tried, when its next attempt starts, and what a run goes on without (S11)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.decide import Decision, GiveUp, Policy, Submit, View, decide
from hpc_rl.orchestrate.graph import Kind, Stage, StageId, build_graph
from hpc_rl.run.ledger import Attempt, History
from tests.orchestrate.simulation import Chaos, Simulation, lewis_like

PATIENT = 1000
"""Attempts of a stage that chaos never uses up."""
TRAIN = StageId(1, "train")
BEFORE_TRAIN = {StageId(0, "train"): 2, StageId(1, "sample"): 2, StageId(1, "grade"): 2}

seeds = st.integers(0, 2**32)


def attempt(stage: str, number: int = 1, **more: object) -> Attempt:
    made = Attempt(f"{stage}-a{number}", 1, stage, number, "slurm", (), (str(number),))
    return replace(made, **more)  # type: ignore[arg-type]


def end(name: str, outcome: str, error: str = "") -> EndRecord:
    return EndRecord(name, name[-1], 0, 0, "node1", outcome, 1, error, "logs/x.out", 1.0, 2.0, 0.0, 0.0)


def after(outcome: str, *, stage: str = "train", notches: int | None = None, history: History | None = None) -> View:
    """A run of one round whose first attempt at a stage has ended so, with all before it done; '' leaves no record."""
    graph = lewis_like(1, 2)
    stages = tuple(replace(s, notches=notches) if s.name == stage else s for s in graph.stages)
    made = history or History((attempt(stage),))
    ends = {f"{stage}-a1": [end(f"{stage}-a1", outcome, "OSError: no")]} if outcome else {}
    done = {id: shards for id, shards in BEFORE_TRAIN.items() if id != StageId(1, stage)}
    return View(replace(graph, stages=stages), done, made, (), ends)


def again(decision: Decision, stage: str = "train") -> Submit:
    return next(a for a in decision.actions if isinstance(a, Submit) and a.stage.id == StageId(1, stage))


# the pause between two attempts


@pytest.mark.parametrize(
    ("outcome", "delay_s"),
    [("error", 60.0), ("killed", 60.0), ("out of memory", 60.0), ("", 60.0), ("left", 0.0), ("done", 0.0)],
)
def test_what_failed_waits_before_it_is_tried_again_and_what_was_told_to_leave_does_not(
    outcome: str, delay_s: float
) -> None:
    """S11: the interval between retries."""
    assert again(decide(after(outcome), Policy(retry_delay_s=60.0))).delay_s == delay_s
    assert again(decide(after(outcome), Policy())).delay_s == 0.0


def test_what_takes_less_memory_now_does_not_wait() -> None:
    assert again(decide(after("out of memory", notches=3), Policy(retry_delay_s=60.0))).delay_s == 0.0


def test_a_job_that_was_blocked_waits_where_only_a_service_can_have_been_missing() -> None:
    blocked = after("blocked")
    assert again(decide(blocked, Policy(retry_delay_s=60.0))).delay_s == 60.0
    without_inputs = replace(blocked, done={StageId(0, "train"): 2, StageId(1, "sample"): 2})
    assert again(decide(without_inputs, Policy(retry_delay_s=60.0))).delay_s == 0.0, "that waits for its inputs"


def test_neither_a_first_attempt_nor_one_that_a_person_asks_for_waits_nor_one_whose_inputs_are_made_again() -> None:
    policy = Policy(retry_delay_s=60.0)
    fresh = decide(View(lewis_like(2, 2), {}, History(), (), {}), policy)
    assert {action.delay_s for action in fresh.actions if isinstance(action, Submit)} == {0.0}
    asked = History((attempt("train", time=5.0),), resumed_at=6.0)
    assert again(decide(after("error", history=asked), policy)).delay_s == 0.0
    failed = replace(attempt("grade"), depends_on=("sample-a1",))
    waits = History((attempt("train", 2, depends_on=("grade-a1",)), failed))
    queue = (Queued("train-a2", "2", "PENDING"),)
    seen = replace(after("error", stage="grade", history=waits), queue=queue)
    actions = decide(seen, policy)
    assert (again(actions, "grade").delay_s, again(actions).delay_s) == (60.0, 0.0)


def test_an_advance_that_died_is_replaced_at_once() -> None:
    seen = after("", history=History((attempt("advance"),)))
    assert again(decide(seen, Policy(retry_delay_s=60.0)), "advance").delay_s == 0.0


# no second attempt


@pytest.mark.parametrize("outcome", ["error", "killed", ""])
def test_without_auto_retry_a_stage_that_failed_once_stops_the_run(outcome: str) -> None:
    """S11: `auto_retry_enabled`."""
    assert decide(after(outcome), Policy()).status == "running"
    decision = decide(after(outcome), Policy(auto_retry=False))
    assert decision.status == "stopped"
    assert decision.reason.startswith("round 1 train failed, and run.auto_retry is off")
    assert ("OSError: no (log: logs/x.out)" in decision.reason) == bool(outcome)


@pytest.mark.parametrize("outcome", ["blocked", "left"])
def test_without_auto_retry_what_is_nobodys_failure_is_done_again(outcome: str) -> None:
    assert decide(after(outcome), Policy(auto_retry=False)).status == "running"


# a limit on rounds


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    lookahead=st.integers(0, 2),
    failures=st.integers(0, 8),
    kills=st.integers(0, 3),
    hetjob=st.booleans(),
)
def test_no_round_begins_before_it_may_and_each_is_played_to_its_end(
    seed: int, lookahead: int, failures: int, kills: int, hetjob: bool
) -> None:
    """S12. That nothing of a later round is submitted the simulation looks at with every decision."""
    graph = lewis_like(3, 2, hetjob)
    run = Simulation(graph, Policy(lookahead, PATIENT, control=False), Chaos(failures, advance_kills=kills), seed)
    for until in (1, 2, 3):
        run.policy = replace(run.policy, until=until)
        status = run.play()
        assert status == ("finished" if until == 3 else "held")
        assert all(run.view().is_done(stage.id) == (stage.round <= until) for stage in graph.work)
        assert {attempt.round for attempt in run.attempts.values()} == set(range(until + 1))
        assert not [job for job in run.scheduler.queue(run.attempts) if job.is_waiting]


def test_what_an_earlier_launch_queued_for_later_rounds_and_its_advances_are_cancelled() -> None:
    graph = lewis_like(2, 2)
    first = Simulation(graph, Policy(1), Chaos(), seed=0)
    first.launch()
    later = [a.name for a in first.attempts.values() if a.round > 0]
    advances = [a.name for a in first.attempts.values() if a.stage == "advance"]
    decision = decide(first.view(), Policy(1, control=False, until=0))
    assert decision.status == "running" and later and len(advances) == 2
    assert {a.name for a in decision.actions} == {*later, *advances}  # type: ignore[union-attr]


# going on without


@settings(deadline=None, max_examples=60)
@given(seed=seeds, kills=st.integers(0, 4), failures=st.integers(0, 5), rounds=st.sets(st.integers(1, 3), min_size=1))
def test_a_run_goes_on_without_what_it_can_do_without_whoever_is_killed(
    seed: int, kills: int, failures: int, rounds: set[int]
) -> None:
    """S11: `auto_continue_on_failure`."""
    policy = Policy(1, PATIENT, continue_on_failure=True)
    run = Simulation(lewis_like(3, 2, optional=("train",)), policy, Chaos(failures, advance_kills=kills), seed)
    for round in rounds:
        run.broken[StageId(round, "train")] = "RuntimeError: the loss is no number"
    assert run.play() == "finished"
    assert set(run.given_up) == {StageId(round, "train") for round in rounds}
    assert all("the loss is no number" in why for why in run.given_up.values())
    if not kills:
        assert run.launches == 1


@pytest.mark.parametrize("advance", [3, 4, 5])
def test_killed_before_each_step_of_giving_up_the_next_reconcile_gives_up(advance: int) -> None:
    for step in range(6):
        policy = Policy(1, continue_on_failure=True)
        chaos = Chaos(kill_exactly=(advance, step))
        run = Simulation(lewis_like(2, 1, optional=("train",)), policy, chaos, seed=step)
        run.broken[TRAIN] = "RuntimeError: x"
        assert run.play() == "finished"
        assert (run.launches, set(run.given_up)) == (1, {TRAIN})


@pytest.mark.parametrize(("optional", "goes_on"), [((), True), (("train",), False), (("train",), True)])
def test_the_run_stops_for_a_stage_that_it_needs_or_where_it_was_not_told_to_go_on(
    optional: tuple[str, ...], goes_on: bool
) -> None:
    run = Simulation(lewis_like(2, 2, optional=optional), Policy(continue_on_failure=goes_on), Chaos(), seed=3)
    run.broken[TRAIN] = "RuntimeError: x"
    assert run.play() == ("finished" if optional and goes_on else "stopped")


def test_with_a_stage_go_those_of_its_round_that_cannot_be_without_it_and_they_go_first() -> None:
    graph = lewis_like(2, 2, optional=("grade", "train"))
    names = ("grade-a1", "grade-a2")
    ends = {name: [end(name, "error", "ValueError: bad")] for name in names}
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    view = View(graph, done, History((attempt("grade", 1), attempt("grade", 2))), (), ends)
    decision = decide(view, Policy(continue_on_failure=True, control=False))
    given_up = [(str(a.stage.id), a.why) for a in decision.actions if isinstance(a, GiveUp)]
    assert [stage for stage, _ in given_up] == ["round 1 train", "round 1 grade"], "of the next round it is tried"
    assert given_up[0][1] == "round 1 grade was given up" and "ValueError: bad" in given_up[1][1]
    submitted = {str(a.stage.id) for a in decision.actions if isinstance(a, Submit)}
    assert {"round 1 evaluate", "round 2 train"} <= submitted and not submitted & {stage for stage, _ in given_up}


@pytest.mark.parametrize("optional", [True, False])
def test_a_service_that_cannot_start_is_given_up_with_the_one_that_it_serves(optional: bool) -> None:
    graph = lewis_like(1, 2, optional=("grade", "train") if optional else ())
    name = "grade.listener-a1"
    history = History((attempt("grade.listener"),))
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    ends = {name: [end(name, "error", "OSError: address in use") for _ in range(3)]}
    decision = decide(View(graph, done, history, (), ends), Policy(continue_on_failure=True))
    assert decision.status == ("running" if optional else "stopped")
    given_up = {a.stage.name: a.why for a in decision.actions if isinstance(a, GiveUp)}
    assert set(given_up) == ({"grade", "train"} if optional else set())
    if optional:
        assert "address in use" in given_up["grade"]


def test_where_the_last_thing_left_is_given_up_the_run_is_finished() -> None:
    last = Stage(StageId(1, "last"), "jobs.last", Kind.SINGLE, optional=True)
    graph = build_graph(1, lambda round: [last] if round else [])
    names = ("last-a1", "last-a2")
    ends = {name: [end(name, "error", "ValueError: bad")] for name in names}
    view = View(graph, {}, History((attempt("last", 1), attempt("last", 2))), (), ends)
    decision = decide(view, Policy(continue_on_failure=True))
    assert (decision.status, [type(action) for action in decision.actions]) == ("finished", [GiveUp])
