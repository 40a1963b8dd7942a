"""The task queue: what is drawn, whatever the order in which attempts finish; and what it counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.engines.base import Prompt
from hpc_rl.run.seeds import derive
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule, VariedGroup
from hpc_rl.sampling.tally import Tally
from hpc_rl.sampling.tasks import Attempt, Task, TaskQueue

Judge = Callable[[Attempt], Outcome]
Drawn = dict[tuple[str, str], list[int]]


def task(row: int = 0, role: str = "speaker") -> Task:
    return Task(f"r01-row{row}-{role}", role, row, f"row{row}", Prompt.of("Describe."))


def run(queue: TaskQueue, judge: Judge, order: random.Random) -> Drawn:
    """Let attempts finish in a random order; the numbers that were drawn, by role and row, in order of drawing."""
    drawn: Drawn = {(one.role, one.row_id): [] for one in queue.tasks}
    running = queue.start()
    new = running
    while True:
        for attempt in new:
            drawn[attempt.task.role, attempt.task.row_id].append(attempt.number)
        assert queue.done == (not running)
        if not running:
            return drawn
        attempt = running.pop(order.randrange(len(running)))
        new = queue.finished(attempt, judge(attempt))
        running += new


def judge_of(seed: int, chance: float) -> Judge:
    """Outcomes that depend on the attempt alone. Sneaky succeeds where helpful fails."""

    def judge(attempt: Attempt) -> Outcome:
        lot = random.Random(derive(seed, attempt.task.row_id, attempt.number))
        right = lot.random() < chance
        return Outcome(right if attempt.task.role != "sneaky" else not right, score=float(lot.randrange(2)))

    return judge


rules = st.one_of(
    st.builds(lambda k, more: KAccepted(k, k + more), st.integers(1, 5), st.integers(0, 6)),
    st.builds(VariedGroup, st.integers(2, 4), st.integers(1, 4)),
)
seeds = st.integers(0, 10**6)


@given(rules, rules, seeds, seeds, seeds, st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.integers(0, 5))
def test_what_is_drawn_does_not_depend_on_what_finishes_first(
    helpful: Rule, sneaky: Rule, outcomes: int, one: int, other: int, chance: float, rows: int
) -> None:
    tasks = [task(row, role) for row in range(rows) for role in ("helpful", "sneaky")]
    judge, found = judge_of(outcomes, chance), []
    for seed in (one, other):
        queue = TaskQueue(tasks, {"helpful": helpful, "sneaky": sneaky})
        drawn = run(queue, judge, random.Random(seed))
        assert all(numbers == list(range(len(numbers))) for numbers in drawn.values()), "each once, in order"
        histories = {one.id: [judge(Attempt(one, n)) for n in range(len(queue.history(one)))] for one in tasks}
        assert {one.id: list(queue.history(one)) for one in tasks} == histories
        found.append((drawn, [one.id for one in queue.exhausted()], [queue.kept(one) for one in tasks]))
    assert found[0] == found[1]


@given(st.integers(1, 5), st.integers(0, 6), seeds, seeds, st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_no_attempt_is_drawn_that_was_not_needed(k: int, more: int, outcomes: int, seed: int, chance: float) -> None:
    """The number drawn is the smallest that holds k accepted ones, or max_tries where none does."""
    judge, max_tries, one = judge_of(outcomes, chance), k + more, task()
    queue = TaskQueue([one], {"speaker": KAccepted(k, max_tries)})
    drawn = run(queue, judge, random.Random(seed))
    right = [number for number in range(max_tries) if judge(Attempt(one, number)).accepted]
    needed = right[k - 1] + 1 if len(right) >= k else max_tries
    assert len(drawn["speaker", "row0"]) == needed
    assert list(queue.kept(one)) == right[:k]
    assert bool(queue.exhausted()) == (len(right) < k)


@given(st.integers(2, 4), st.integers(1, 4), seeds, seeds)
def test_groups_are_drawn_up_to_the_first_that_varies(size: int, groups: int, outcomes: int, seed: int) -> None:
    judge, one = judge_of(outcomes, 1.0), task()
    queue = TaskQueue([one], {"speaker": VariedGroup(size, groups)})
    drawn = run(queue, judge, random.Random(seed))
    scores = [{judge(Attempt(one, size * group + place)).score for place in range(size)} for group in range(groups)]
    varied = next((group for group in range(groups) if len(scores[group]) > 1), None)
    last = groups - 1 if varied is None else varied
    assert len(drawn["speaker", "row0"]) == size * (last + 1)
    assert list(queue.kept(one)) == ([] if varied is None else list(range(size * last, size * last + size)))


def test_helpful_is_drawn_until_right_and_sneaky_until_wrong() -> None:
    right = {0: False, 1: False, 2: True, 3: True}

    def judge(attempt: Attempt) -> Outcome:
        return Outcome(right[attempt.number] == (attempt.task.role == "helpful"))

    helpful, sneaky = task(role="helpful"), task(role="sneaky")
    queue = TaskQueue([helpful, sneaky], {"helpful": KAccepted(1, 4), "sneaky": KAccepted(2, 4)})
    assert run(queue, judge, random.Random(0)) == {("helpful", "row0"): [0, 1, 2], ("sneaky", "row0"): [0, 1]}
    assert (queue.kept(helpful), queue.kept(sneaky), queue.exhausted()) == ((2,), (0, 1), [])


def test_a_retry_goes_back_at_once_and_is_of_the_same_task() -> None:
    queue = TaskQueue([task(0), task(1)], {"speaker": KAccepted(2, 3)})
    first = queue.start()
    assert [attempt.id for attempt in first] == [f"r01-row{row}-speaker-g{n}" for row in (0, 1) for n in (0, 1)]
    assert queue.finished(first[2], Outcome(True)) == []
    (again,) = queue.finished(first[3], Outcome(False))
    assert (again.task.row_id, again.number, again.id) == ("row1", 2, "r01-row1-speaker-g2")


def test_every_attempt_has_a_seed_of_its_own() -> None:
    attempts = [Attempt(task(row, role), n) for row in range(4) for role in ("helpful", "sneaky") for n in range(4)]
    seeds = {attempt.seed(run_seed, round) for attempt in attempts for run_seed in (0, 1) for round in (1, 2)}
    assert len(seeds) == 4 * len(attempts)
    assert Attempt(task(3), 2).seed(7, 5) == derive(7, 5, "speaker", "row3", 2)


def test_an_attempt_finishes_once_and_only_if_it_was_drawn() -> None:
    queue = TaskQueue([task()], {"speaker": KAccepted(2, 4)})
    first, second = queue.start()
    queue.finished(first, Outcome(True))
    with pytest.raises(ValueError, match="r01-row0-speaker-g0 has finished before"):
        queue.finished(first, Outcome(True))
    for stranger in (Attempt(task(), 2), Attempt(task(), -1), Attempt(task(1), 0)):
        with pytest.raises(ValueError, match=rf"{stranger.id} was never drawn"):
            queue.finished(stranger, Outcome(True))
    assert not queue.done
    queue.finished(second, Outcome(True))
    assert queue.done


def test_tasks_that_cannot_be_told_apart_and_roles_without_a_rule_are_refused() -> None:
    rule: Mapping[str, Rule] = {"speaker": KAccepted(1, 1)}
    with pytest.raises(ValueError, match="r01-row0-speaker is there twice"):
        TaskQueue([task(), task()], rule)
    with pytest.raises(ValueError, match=r"other is there twice \(row row0, role speaker\)"):
        TaskQueue([task(), Task("other", "speaker", 0, "row0", Prompt.of("?"))], rule)
    with pytest.raises(ValueError, match="the role 'judge', for which there is no rule; there are rules for speaker"):
        TaskQueue([task(role="judge")], rule)


def test_a_shard_without_tasks_is_done_when_it_starts() -> None:
    queue = TaskQueue([], {"speaker": KAccepted(1, 1)})
    assert not queue.done and queue.start() == [] and queue.done and queue.exhausted() == []
    assert Tally.of(queue) == Tally()


def test_tallies_of_shards_add_up_to_that_of_all() -> None:
    rule: Mapping[str, Rule] = {"helpful": KAccepted(2, 5), "sneaky": KAccepted(1, 2)}
    tasks = [task(row, role) for row in range(12) for role in ("helpful", "sneaky")]
    judge, total = judge_of(3, 0.5), Tally()
    whole = TaskQueue(tasks, rule)
    run(whole, judge, random.Random(0))
    for part in (tasks[:1], tasks[1:10], tasks[10:], []):
        queue = TaskQueue(part, rule)
        run(queue, judge, random.Random(1))
        total += Tally.from_plain(json.loads(json.dumps(Tally.of(queue).to_plain())))
    assert total == Tally.of(whole)
    for role in ("helpful", "sneaky"):
        own = [one for one in tasks if one.role == role]
        assert total.tasks(role) == 12 and total.attempts(role) == sum(len(whole.history(one)) for one in own)
        assert total.accepted[role] == sum(len(whole.kept(one)) for one in own)
        assert total.exhausted[role] == sum(one.role == role for one in whole.exhausted()) > 0
