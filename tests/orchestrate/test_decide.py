"""`decide` against a simulated scheduler: whatever fails, whoever is killed when, a run that can finish does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.cluster.base import Queued
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.decide import Cancel, Policy, Submit, View, WriteOff, decide
from hpc_rl.orchestrate.graph import ADVANCE, Graph, Kind, StageId
from hpc_rl.run.ledger import Attempt, History
from tests.orchestrate.simulation import Chaos, Simulation, lewis_like

PATIENT = 1000
"""Attempts of a stage that chaos never uses up."""

seeds = st.integers(0, 2**32)
hetjobs = st.booleans()
replicas = st.integers(1, 3)


def world(graph: Graph, policy: Policy, chaos: Chaos, seed: int, tasks: int = 2, replicas: int = 1) -> Simulation:
    """A simulated run. Where a service is in its consumer's job neither is an array."""
    return Simulation(graph, policy, chaos, seed, tasks, 1 if graph.companions else replicas)


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    rounds=st.integers(1, 3),
    shards=st.integers(1, 5),
    tasks=st.integers(1, 3),
    lookahead=st.integers(0, 2),
    hetjob=hetjobs,
    replicas=replicas,
)
def test_a_run_in_which_nothing_fails_submits_each_stage_once_and_finishes(
    seed: int, rounds: int, shards: int, tasks: int, lookahead: int, hetjob: bool, replicas: int
) -> None:
    run = world(lewis_like(rounds, shards, hetjob), Policy(lookahead), Chaos(), seed, tasks, replicas)
    assert run.play() == "finished"
    assert run.launches == 1
    assert all(len(run.submissions(stage.id)) == 1 for stage in run.graph.work)


@settings(deadline=None, max_examples=80)
@given(
    seed=seeds,
    rounds=st.integers(1, 3),
    shards=st.integers(1, 4),
    tasks=st.integers(1, 3),
    lookahead=st.integers(0, 2),
    failures=st.integers(0, 25),
    hetjob=hetjobs,
    replicas=replicas,
)
def test_a_run_whose_jobs_fail_in_all_ways_finishes_without_anybody_looking(
    seed: int, rounds: int, shards: int, tasks: int, lookahead: int, failures: int, hetjob: bool, replicas: int
) -> None:
    graph = lewis_like(rounds, shards, hetjob)
    run = world(graph, Policy(lookahead, PATIENT), Chaos(failures, failures), seed, tasks, replicas)
    assert run.play() == "finished"
    assert run.launches == 1, "the user had to launch again"
    assert all(run.view().is_done(stage.id) for stage in run.graph.work)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, lookahead=st.integers(0, 2), leaves=st.integers(0, 12), replicas=replicas)
def test_services_that_leave_idle_while_their_consumers_wait_do_not_use_up_attempts(
    seed: int, lookahead: int, leaves: int, replicas: int
) -> None:
    run = world(lewis_like(2, 2), Policy(lookahead), Chaos(idle_leaves=leaves), seed, replicas=replicas)
    assert run.play() == "finished"
    assert run.launches == 1


@pytest.mark.parametrize("hetjob", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("advance", [1, 2, 3])
def test_an_advance_killed_before_each_of_its_steps_is_made_good_by_the_next(
    advance: int, lookahead: int, hetjob: bool
) -> None:
    for step in range(28):
        run = Simulation(lewis_like(2, 2, hetjob), Policy(lookahead), Chaos(kill_exactly=(advance, step)), seed=step)
        assert run.play() == "finished"
        assert run.launches == 1, f"killed before step {step}, nobody was left to go on"


@settings(deadline=None, max_examples=80)
@given(seed=seeds, lookahead=st.integers(0, 2), failures=st.integers(0, 10), hetjob=hetjobs, replicas=replicas)
def test_one_advance_killed_among_other_failures_is_made_good_by_the_next(
    seed: int, lookahead: int, failures: int, hetjob: bool, replicas: int
) -> None:
    run = world(lewis_like(3, 3, hetjob), Policy(lookahead, PATIENT), Chaos(failures), seed, replicas=replicas)
    run.launch()
    run.chaos.advance_kills = 1
    launched = run.launches
    assert run.play() == "finished"
    assert run.launches == launched + 1


@settings(deadline=None, max_examples=80)
@given(
    seed=seeds,
    lookahead=st.integers(0, 2),
    failures=st.integers(0, 10),
    kills=st.integers(0, 10),
    hetjob=hetjobs,
    replicas=replicas,
)
def test_whatever_is_killed_launching_again_finishes_the_run(
    seed: int, lookahead: int, failures: int, kills: int, hetjob: bool, replicas: int
) -> None:
    run = world(
        lewis_like(2, 3, hetjob),
        Policy(lookahead, PATIENT),
        Chaos(failures, advance_kills=kills),
        seed,
        replicas=replicas,
    )
    assert run.play() == "finished"
    assert run.launches <= 1 + kills


@settings(deadline=None, max_examples=60)
@given(seed=seeds, failures=st.integers(0, 10), kills=st.integers(0, 3), hetjob=hetjobs)
def test_a_launcher_that_stays_needs_no_advance_jobs(seed: int, failures: int, kills: int, hetjob: bool) -> None:
    run = Simulation(
        lewis_like(2, 3, hetjob), Policy(1, PATIENT, control=False), Chaos(failures, advance_kills=kills), seed
    )
    assert run.play() == "finished"
    assert not any(attempt.stage == ADVANCE for attempt in run.attempts.values())


@settings(deadline=None, max_examples=80)
@given(
    seed=seeds,
    stage=st.sampled_from(["sample", "grade", "train", "evaluate", "grade.listener"]),
    kills=st.integers(0, 2),
    hetjob=hetjobs,
)
def test_a_program_error_that_repeats_itself_stops_the_run(seed: int, stage: str, kills: int, hetjob: bool) -> None:
    run = Simulation(lewis_like(2, 3, hetjob), Policy(), Chaos(advance_kills=kills), seed)
    run.broken[StageId(1, stage)] = "KeyError: 'speaker_problm' in row 17"
    assert run.play() == "stopped"
    # twice per launch: whoever launches again asks for another try
    failed = [
        a for a in run.submissions(StageId(1, stage)) if any(e.outcome == "error" for e in run.ends.get(a.name, ()))
    ]
    assert len(failed) <= 2 * max(1, run.launches)
    assert "same error: KeyError: 'speaker_problm'" in run.stopped
    assert f"round 1 {stage} failed" in run.stopped
    assert not [job for job in run.scheduler.queue(run.attempts) if job.is_waiting], "nothing waits for a lost cause"


@settings(deadline=None, max_examples=40)
@given(seed=seeds)
def test_a_run_that_stopped_goes_on_when_it_is_launched_again_with_the_error_mended(seed: int) -> None:
    run = Simulation(lewis_like(2, 3), Policy(), Chaos(), seed)
    run.broken[StageId(1, "grade")] = "KeyError: 'x'"
    assert run.play() == "stopped"
    run.broken.clear()
    assert run.play() == "finished"


@settings(deadline=None, max_examples=40)
@given(seed=seeds, attempts=st.integers(1, 4))
def test_a_stage_that_never_ends_well_is_given_up_after_max_attempts(seed: int, attempts: int) -> None:
    run = Simulation(lewis_like(2, 3), Policy(1, attempts), Chaos(), seed, tasks=1)
    train = StageId(1, "train")

    def lose_training() -> None:
        for job, at in run.scheduler.running():
            if job.stage.id == train:
                job.elements[at] = "ENDED"

    status = run.launch()
    for _ in range(2000):
        lose_training()
        possible = [*run.scheduler.startable(), *run.scheduler.running()]
        if status != "running" or not possible:
            break
        job, at = run.chance.choice(possible)
        if job.elements[at] == "PENDING":
            job.elements[at] = "RUNNING"
        else:
            status = run._run(job, at) or status
    assert status == "stopped"
    assert run.stopped.startswith(f"round 1 train is not done after {attempts} attempts")
    assert len(run.submissions(train)) == attempts


# single decisions


def view(**changes: object) -> View:
    empty = View(lewis_like(2, 2), {}, History(), (), {})
    return replace(empty, **changes)  # type: ignore[arg-type]


def attempt(stage: str, number: int = 1, job_id: str | None = "1", **more: object) -> Attempt:
    ids = None if job_id is None else (job_id,)
    return replace(Attempt(f"{stage}-a{number}", 0, stage, number, "slurm", (), ids), **more)  # type: ignore[arg-type]


def end(name: str, outcome: str, error: str = "", rank: int = 0, ended: float = 1.0, job_id: str = "1") -> EndRecord:
    return EndRecord(name, job_id, 0, rank, "node1", outcome, 1, error, "logs/x.out", ended - 1, ended, 0.0, 0.0)


def submitted(decision_actions: tuple[object, ...]) -> list[str]:
    return [str(action.stage.id) for action in decision_actions if isinstance(action, Submit)]


def test_a_fresh_run_submits_the_first_round_the_next_one_and_two_advances() -> None:
    actions = decide(view(), Policy()).actions
    listeners = ["round 1 grade.listener", "round 1 grade"], ["round 1 evaluate.listener", "round 1 evaluate"]
    assert submitted(actions) == [
        "round 0 train",
        "round 0 advance",
        "round 1 sample",
        *listeners[0],
        "round 1 train",
        *listeners[1],
        "round 1 advance",
    ]


def test_jobs_wait_for_the_end_of_what_they_need_and_for_the_start_of_their_service() -> None:
    by_stage = {a.stage.id: a for a in decide(view(), Policy()).actions if isinstance(a, Submit)}
    grade = by_stage[StageId(1, "grade")]
    assert grade.after_end == (StageId(1, "sample"),)
    assert grade.after_start == (StageId(1, "grade.listener"),)


def test_a_service_in_the_job_of_its_consumer_is_submitted_with_it() -> None:
    actions = decide(view(graph=lewis_like(1, 2, hetjob=True)), Policy()).actions
    assert "round 1 grade.listener" not in submitted(actions)
    grade = next(a for a in actions if isinstance(a, Submit) and a.stage.name == "grade")
    assert grade.beside == (Submit(lewis_like(1, 2, hetjob=True)[StageId(1, "grade.listener")], 1),)
    assert (grade.after_end, grade.after_start) == ((StageId(1, "sample"),), ())


def test_the_job_of_a_consumer_that_is_submitted_again_takes_a_service_that_was_left_over_with_it() -> None:
    """The consumer has ended; its component of the job is still there."""
    history = History(tuple(replace(attempt(s, job_id="5"), round=1) for s in ("grade", "grade.listener")))
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    queue = (Queued("grade.listener-a1", "5", "RUNNING"),)
    actions = decide(View(lewis_like(1, 2, hetjob=True), done, history, queue, {}), Policy()).actions
    again = next(a for a in actions if isinstance(a, Submit) and a.stage.name == "grade")
    assert (again.number, [service.number for service in again.beside]) == (2, [2])
    assert [a.name for a in actions if isinstance(a, Cancel)] == ["grade.listener-a1"]


def test_of_a_waiting_job_of_two_the_consumer_is_cancelled_first() -> None:
    """Slurm refuses to cancel one component of a heterogeneous job that waits, unless it is the first."""
    names = ("grade", "grade.listener")
    history = History(tuple(replace(attempt(s, job_id="5"), round=1) for s in names))
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2, StageId(1, "grade"): 2}
    queue = tuple(Queued(f"{s}-a1", "5", "PENDING") for s in reversed(names))
    actions = decide(View(lewis_like(1, 2, hetjob=True), done, history, queue, {}), Policy()).actions
    assert [a.name for a in actions if isinstance(a, Cancel)] == ["grade-a1", "grade.listener-a1"]


@pytest.mark.parametrize("status", ["running", "stopped", "finished"])
def test_of_a_job_of_two_that_was_requeued_the_service_is_not_cancelled_while_the_consumer_is_not_yet_gone(
    status: str,
) -> None:
    """Its node is still cleaned up; the other component waits already."""
    graph = lewis_like(1, 2, hetjob=True)
    history = History(
        tuple(replace(attempt(s, job_id="5"), round=1) for s in ("grade", "grade.listener")),
        stopped="a reason" if status == "stopped" else "",
    )
    done = {stage.id: stage.shards for stage in graph.work if status == "finished" or stage.name in ("sample", "grade")}
    queue = (Queued("grade-a1", "5", "COMPLETING"), Queued("grade.listener-a1", "5", "PENDING"))
    found = decide(View(graph, {StageId(0, "train"): 2, **done}, history, queue, {}), Policy())
    assert found.status == status
    assert not [action for action in found.actions if isinstance(action, Cancel)]


def test_a_paused_run_is_left_alone() -> None:
    decision = decide(view(history=History(paused="cancelled by the user")), Policy())
    assert (decision.actions, decision.status, decision.reason) == ((), "paused", "cancelled by the user")


def test_a_finished_run_cancels_what_still_waits_and_submits_nothing() -> None:
    graph = lewis_like(2, 2)
    waiting = Queued("advance-a1", "9", "PENDING")
    found = decide(
        view(
            done={stage.id: stage.shards for stage in graph.work},
            history=History((attempt(ADVANCE),)),
            queue=(waiting,),
        ),
        Policy(),
    )
    assert found.status == "finished"
    assert found.actions == (Cancel("advance-a1", "the run is finished", waiting_only=True),)


def test_what_waits_for_a_job_that_was_submitted_again_is_submitted_again_too() -> None:
    graph = lewis_like(1, 2)
    history = History(
        (
            attempt("train"),
            replace(attempt("sample", job_id="2"), round=1, depends_on=("train-a1",)),
        )
    )
    actions = decide(
        View(graph, {}, history, (Queued("sample-a1", "2", "PENDING", "Dependency"),), {}), Policy()
    ).actions
    assert [a.name for a in actions if isinstance(a, Cancel)] == ["sample-a1"]
    again = next(a for a in actions if isinstance(a, Submit) and a.stage.name == "sample")
    assert (again.number, again.after_end) == (2, (StageId(0, "train"),))


def test_elements_that_wait_for_work_that_is_done_are_cancelled() -> None:
    history = History((attempt("train"),))
    queue = (Queued("train-a1", "1_0", "RUNNING"), Queued("train-a1", "1_[1-7]", "PENDING"))
    actions = decide(view(done={StageId(0, "train"): 2}, history=history, queue=queue), Policy()).actions
    assert actions[0] == Cancel("train-a1", "its work is done", waiting_only=True)
    assert "round 0 train" not in submitted(actions)


def test_an_intent_that_no_job_came_of_is_written_off_and_submitted_again() -> None:
    actions = decide(view(history=History((attempt("train", job_id=None),))), Policy()).actions
    assert actions[0] == WriteOff("train-a1")
    assert next(a.number for a in actions if isinstance(a, Submit) and a.stage.name == "train") == 2


def test_a_job_that_shows_up_after_it_was_written_off_counts_and_its_double_goes_while_it_waits() -> None:
    late = attempt("train", 1, job_id=None, written_off=True)
    queue = (Queued("train-a1", "5", "RUNNING"), Queued("train-a2", "6", "PENDING"))
    actions = decide(view(history=History((late, attempt("train", 2, "6"))), queue=queue), Policy()).actions
    assert [a.name for a in actions if isinstance(a, Cancel)] == ["train-a2"]
    assert "round 0 train" not in submitted(actions)


def test_one_error_of_many_ranks_is_one_error() -> None:
    ends = {"train-a1": [end("train-a1", "error", "ValueError: bad", rank) for rank in range(8)]}
    assert decide(view(history=History((attempt("train"),)), ends=ends), Policy()).status == "running"


def test_an_error_of_any_rank_counts_although_rank_0_was_only_told_to_leave() -> None:
    names = ("train-a1", "train-a2")
    ends = {n: [end(n, "left", rank=0), end(n, "error", "ValueError: bad", rank=3)] for n in names}
    history = History((attempt("train", 1), attempt("train", 2)))
    assert decide(view(history=history, ends=ends), Policy()).status == "stopped"


def test_a_service_that_fails_the_same_way_again_and_again_in_place_stops_the_run() -> None:
    graph = lewis_like(1, 2)
    name = "grade.listener-a1"
    history = History((replace(attempt("grade.listener"), round=1),))
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    ends = {name: [end(name, "error", "OSError: address in use", ended=t) for t in (1, 2, 3)]}
    decision = decide(View(graph, done, history, (), ends), Policy())
    assert decision.status == "stopped"
    assert "round 1 grade.listener failed 3 times" in decision.reason


def test_errors_that_differ_in_numbers_and_addresses_only_are_the_same() -> None:
    errors = ("RuntimeError: shard 3 at 0x7f00 of a1b2c3d4", "RuntimeError: shard 12 at 0x7fff of 99aa00bb")
    history = History((attempt("train", 1), attempt("train", 2)))
    ends = {f"train-a{n}": [end(f"train-a{n}", "error", error)] for n, error in enumerate(errors, 1)}
    assert decide(view(history=history, ends=ends), Policy()).status == "stopped"


@pytest.mark.parametrize("outcome", ["killed", "left", "blocked", "out of memory"])
def test_ends_that_are_not_the_programs_fault_do_not_stop_the_run_when_they_repeat(outcome: str) -> None:
    history = History((attempt("train", 1), attempt("train", 2)))
    ends = {n: [end(n, outcome, "the same words")] for n in ("train-a1", "train-a2")}
    assert decide(view(history=history, ends=ends), Policy(max_attempts=3)).status == "running"


def short_of_memory(attempts: int, notches: int | None, tasks: int = 1) -> View:
    """A sample stage that may take less memory so many times, after so many arrays that all ran out of it."""
    graph = lewis_like(1, 2)
    stages = tuple(replace(s, notches=notches) if s.name == "sample" else s for s in graph.stages)
    history = History(tuple(replace(attempt("sample", n, str(n)), round=1) for n in range(1, attempts + 1)))
    ends = {
        f"sample-a{n}": [
            end(f"sample-a{n}", "out of memory", "CUDA out of memory", ended=10.0 * n + task / 10, job_id=f"{n}_{task}")
            for task in range(tasks)
        ]
        for n in range(1, attempts + 1)
    }
    return View(Graph(stages, graph.rounds), {StageId(0, "train"): 2}, history, (), ends)


def test_attempts_that_take_less_memory_each_time_do_not_count_until_it_goes_no_lower() -> None:
    few = Policy(max_attempts=2)
    for attempts in range(1, 5):
        assert decide(short_of_memory(attempts, notches=4), few).status == "running"
    last = decide(short_of_memory(5, notches=4), few)
    assert last.status == "stopped"
    assert "round 1 sample ran out of memory 5 times, the last time with settings that go no lower" in last.reason
    assert "(log: logs/x.out)" in last.reason


def test_an_array_whose_tasks_all_run_out_of_memory_at_once_has_tried_once() -> None:
    assert decide(short_of_memory(3, notches=4, tasks=8), Policy()).status == "running"
    assert decide(short_of_memory(5, notches=4, tasks=8), Policy()).status == "stopped"


def test_a_stage_without_a_rule_for_memory_has_its_attempts_and_no_more() -> None:
    assert decide(short_of_memory(2, notches=None), Policy(max_attempts=3)).status == "running"
    last = decide(short_of_memory(3, notches=None), Policy(max_attempts=3))
    assert last.status == "stopped" and "is not done after 3 attempts; the last one: out of memory" in last.reason


@pytest.mark.parametrize("notches", [0, 1])
def test_a_stage_whose_settings_can_get_no_lower_is_not_tried_again_and_again(notches: int) -> None:
    assert decide(short_of_memory(1, notches=notches), Policy()).status == "running"
    last = decide(short_of_memory(2, notches=notches), Policy())
    assert last.status == "stopped" and "with settings that go no lower. Lower sample.max_model_len" in last.reason


def test_a_stage_may_have_a_way_out_of_its_own() -> None:
    seen = short_of_memory(1, notches=0)
    stages = tuple(replace(s, way_out="Lower train.max_length") for s in seen.graph.stages)
    last = decide(replace(seen, graph=Graph(stages, seen.graph.rounds), notches={StageId(1, "sample"): 2}), Policy())
    assert "with settings that go no lower. Lower train.max_length; the last one: CUDA out of memory" in last.reason


def test_a_stage_that_began_its_round_with_the_lowest_settings_is_not_tried_again_and_again() -> None:
    at_first = short_of_memory(1, notches=4)
    assert decide(replace(at_first, notches={StageId(1, "sample"): 4}), Policy()).status == "running"
    last = decide(replace(at_first, notches={StageId(1, "sample"): 5}), Policy())
    assert last.status == "stopped" and "ran out of memory once with settings that go no lower" in last.reason


def test_being_blocked_counts_for_less_than_failing() -> None:
    attempts = tuple(attempt("train", n) for n in range(1, 6))
    blocked = {a.name: [end(a.name, "blocked")] for a in attempts}
    failed = {a.name: [end(a.name, "killed")] for a in attempts}
    assert decide(view(history=History(attempts), ends=blocked), Policy(max_attempts=5)).status == "running"
    assert decide(view(history=History(attempts), ends=failed), Policy(max_attempts=5)).status == "stopped"


@pytest.mark.parametrize(("stage", "status"), [("grade.listener", "running"), ("grade", "stopped")])
def test_only_a_service_may_end_well_before_its_work_is_done(stage: str, status: str) -> None:
    history = History(tuple(replace(attempt(stage, n), round=1) for n in range(1, 6)))
    ends = {a.name: [end(a.name, "done")] for a in history.attempts}
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    assert decide(View(lewis_like(1, 2), done, history, (), ends), Policy(max_attempts=5)).status == status


def test_a_service_that_ended_with_its_consumer_before_it_had_begun_has_not_failed() -> None:
    pairs = [(replace(attempt(s, n), round=1) for s in ("grade", "grade.listener")) for n in range(1, 6)]
    history = History(tuple(one for pair in pairs for one in pair))
    ends = {f"grade-a{n}": [end(f"grade-a{n}", "blocked")] for n in range(1, 6)}
    graph, done = lewis_like(1, 2, hetjob=True), {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    assert decide(View(graph, done, history, (), ends), Policy(max_attempts=5)).status == "running"


def test_the_advance_that_asks_is_about_to_end_and_does_not_count() -> None:
    graph = lewis_like(2, 2)
    me = attempt(ADVANCE)
    queue = (Queued(me.name, "1", "RUNNING"),)
    actions = decide(View(graph, {}, History((me,)), queue, {}), Policy(), me=me.name).actions
    assert "round 0 advance" in submitted(actions)
    assert all(
        graph[a.stage.id].kind is not Kind.CONTROL or a.number == 2 - a.stage.round
        for a in actions
        if isinstance(a, Submit)
    )
