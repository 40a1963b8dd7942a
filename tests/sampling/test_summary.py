"""What sampling achieved and cost: numbers by hand, and parts that add up whatever happened to the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.manifest import Manifest
from hpc_rl.sampling.lives import PARTS, Life, lives
from hpc_rl.sampling.published import Published, published
from hpc_rl.sampling.record import PHASES, TaskRecord
from hpc_rl.sampling.summary import Summary, summarise
from hpc_rl.sampling.tally import Tally
from hpc_rl.sampling.text import COLUMNS, text


def shard(index: int, task: str, tokens: int, tally: Tally, **metrics: int) -> Manifest:
    samples = sum(tally.attempts(role) for role in tally.tries)
    numbers = {"prompts": 2, "dropped": 0, "samples": samples, "tokens": tokens, "cut_off": 0, **metrics}
    return Manifest(1, "sample", index, (), metrics={"task": task, "by_role": tally.to_plain(), **numbers})


def record(name: str, began: float, ended: float | None, tokens: int = 0, **seconds: float) -> TaskRecord:
    spent = {phase: seconds.pop(phase, 0.0) for phase in PHASES}
    assert not seconds
    return TaskRecord(
        name=name, attempt="a1", job_id=name, restart=0, host="node1", gpus=2.0, started=began,
        updated=began + sum(spent.values()), ended=ended, seconds=spent, tokens=tokens, samples=tokens // 10,
    )  # fmt: skip


def end(job_id: str, started: float, ended: float, outcome: str = "done", error: str = "") -> EndRecord:
    gpu_s, log = 2.0 * (ended - started), f"logs/{job_id}-0.out"
    return EndRecord("a1", job_id, 0, 0, "node1", outcome, 0, error, log, started, ended, 1.0, gpu_s)


def test_a_task_that_published_all_that_it_drew_has_lost_nothing() -> None:
    task = record("t", 110.0, 150.0, 400, start_up=5.0, sampling=30.0, judging=2.0, publishing=1.0, waiting=2.0)
    (life,) = lives([task], [end("t", 100.0, 151.0)], {"t": 400}, complete=False)
    assert life.seconds == {
        "start_up": 15.0, "sampling": 30.0, "judging": 2.0, "publishing": 1.0, "waiting": 2.0, "lost": 0.0,
        "closing": 1.0, "unknown": 0.0,
    }  # fmt: skip
    assert (life.began, life.ended, life.gpu_s, life.lost_tokens, life.is_over) == (100.0, 151.0, 102.0, 0, True)


def test_of_a_killed_task_the_sampling_of_what_it_did_not_publish_is_lost() -> None:
    task = record("t", 100.0, None, 400, start_up=5.0, sampling=40.0)
    (life,) = lives([task], [end("t", 100.0, 160.0)], {"t": 100}, complete=False)
    assert (life.seconds["sampling"], life.seconds["lost"], life.lost_tokens) == (10.0, 30.0, 300)
    assert (life.seconds["unknown"], life.seconds["closing"]) == (15.0, 0.0), "after its last record"


def test_a_task_at_work_has_lost_only_what_it_knows_of_and_all_else_once_the_stage_is_complete() -> None:
    task = replace(record("t", 100.0, None, 400, sampling=40.0), lost_tokens=100)
    (running,) = lives([task], [], {"t": 200}, complete=False)
    assert (running.is_over, running.lost_tokens, running.seconds["lost"], running.gpu_s) == (False, 100, 10.0, 80.0)
    (over,) = lives([task], [], {"t": 200}, complete=True)
    assert (over.is_over, over.lost_tokens, over.seconds["lost"]) == (True, 200, 20.0)


def test_lives_of_a_requeued_task_have_their_own_records() -> None:
    first = record("one", 101.0, None, 100, sampling=40.0)
    second = replace(record("two", 201.0, 240.0, 100, sampling=39.0), job_id="one", restart=1)
    ends = [end("one", 100.0, 150.0), replace(end("one", 200.0, 241.0), restart=1)]
    found = lives([second, first], ends, {"two": 100}, complete=False)
    assert [life.record and life.record.name for life in found] == ["one", "two"]
    assert [life.lost_tokens for life in found] == [100, 0]
    assert [sum(life.seconds.values()) for life in found] == [50.0, 41.0]


def test_a_task_without_a_record_ended_while_it_started() -> None:
    (life,) = lives([], [end("t", 100.0, 103.0)], {}, complete=False)
    assert life == Life(
        100.0, 103.0, True, {**dict.fromkeys(PARTS, 0.0), "start_up": 3.0}, 6.0, outcome="done", log="logs/t-0.out"
    )


SECONDS = st.floats(0, 1000, allow_nan=False)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[TaskRecord], list[EndRecord], Mapping[str, int]]:
    """Tasks in all conditions: with and without end records, records and last words; clocks that differ a little."""
    records, ends, kept = [], [], {}
    for number in range(draw(st.integers(1, 6))):
        name, began = f"t{number}", draw(SECONDS)
        one = record(name, began, None, draw(st.integers(0, 1000)), **{phase: draw(SECONDS) for phase in PHASES})
        if draw(st.booleans()):
            one = replace(one, ended=one.updated + draw(st.floats(-0.5, 0.5)))
        if draw(st.booleans()):
            started = began - draw(st.floats(-0.5, 20))
            ends.append(end(name, started, max(started, one.updated) + draw(st.floats(-0.5, 50))))
        kept[name] = draw(st.integers(0, 1000))
        if draw(st.booleans()):
            records.append(one)
    return records, ends, kept


@given(tasks(), st.booleans())
def test_the_parts_of_every_life_add_up_to_it_and_none_is_negative(
    given: tuple[list[TaskRecord], list[EndRecord], Mapping[str, int]], complete: bool
) -> None:
    records, ends, kept = given
    found = lives(records, ends, kept, complete)
    assert len(found) == len({one.name for one in records} | {one.job_id for one in ends})
    for life in found:
        assert sum(life.seconds.values()) == pytest.approx(life.ended - life.began, abs=1e-6)
        assert all(seconds >= -1e-9 for seconds in life.seconds.values())
        assert 0 <= life.lost_tokens <= life.tokens
        if life.record is not None:
            sampled = life.record.seconds["sampling"]
            assert life.seconds["sampling"] + life.seconds["lost"] == pytest.approx(sampled)
    summed = summarise(Published(), found)
    assert summed.task_s == pytest.approx(sum(life.ended - life.began for life in found), abs=1e-5)
    assert sum(summed.share(part) for part in PARTS) == pytest.approx(1 if summed.task_s else 0)


HELPFUL = Tally({"helpful": {2: 3, 5: 1}}, {"helpful": 8}, {"helpful": 0})
SNEAKY = Tally({"sneaky": {2: 1, 8: 1}}, {"sneaky": 3}, {"sneaky": 1})


def sampled() -> Summary:
    """Two tasks, of which the second was killed, and one that came too late."""
    shards = [
        shard(0, "one", 300, HELPFUL + SNEAKY, cut_off=4),
        shard(1, "one", 500, HELPFUL, dropped=1),
        shard(2, "two", 200, SNEAKY),
    ]
    done = published(iter(shards))
    records = [
        replace(
            record("one", 105.0, 199.0, 800, start_up=10.0, sampling=70.0, judging=4.0, publishing=2.0, waiting=8.0),
            full_s=63.0, loading={"staging": 1.0, "engine": 8.0}, engine={
                "engine": "vllm", "asked": "auto", "max_num_seqs": 256, "compile_cache": None,
                "workers": [
                    {"deaths": 2, "hung": 1, "up_s": 50.0, "busy_s": 20.0},
                    {"deaths": 0, "hung": 0, "up_s": 60.0, "busy_s": 57.0},
                ],
            },
        ),
        replace(
            record("two", 110.0, None, 400, start_up=10.0, sampling=40.0), full_s=36.0,
            loading={"staging": 3.0, "engine": 10.0}, engine={"engine": "vllm", "asked": "auto", "max_num_seqs": 128},
        ),
    ]  # fmt: skip
    ends = [end("one", 100.0, 200.0), end("two", 105.0, 170.0, "killed"), end("late", 195.0, 205.0)]
    return summarise(done, lives(records, ends, done.kept, complete=True))


def test_a_pool_in_a_record_of_code_that_knew_of_no_hanging_workers_has_had_none() -> None:
    had = replace(record("one", 105.0, 199.0), engine={"engine": "vllm", "workers": [{"deaths": 2, "busy_s": 3.0}]})
    found = summarise(published(iter([])), lives([had], [end("one", 100.0, 200.0)], {}, complete=True))
    assert [(worker.deaths, worker.hung) for worker in found.workers] == [(2, 0)]


def test_the_numbers_of_a_round_are_those_worked_out_by_hand() -> None:
    found = sampled()
    assert (found.tasks, found.running, found.ends) == (3, 0, {"done": 2, "killed": 1})
    assert (found.published.shards, found.published.samples, found.published.tokens) == (3, 42, 1000)
    assert (found.published.accepted, found.lost_tokens, found.tokens) == (22, 200, 1200)
    assert found.seconds == {
        "start_up": 15.0 + 15.0 + 10.0, "sampling": 70.0 + 20.0, "judging": 4.0, "publishing": 2.0, "waiting": 8.0,
        "lost": 20.0, "closing": 1.0, "unknown": 10.0,
    }  # fmt: skip
    assert (found.task_s, found.gpu_s, found.wall_s) == (175.0, 350.0, 105.0)
    assert found.tokens_per_s == pytest.approx(1200 / 110)
    assert found.tokens_per_s_with_start_up == pytest.approx(1200 / 150)
    assert found.tokens_per_s_of_all == pytest.approx(1000 / 105)
    assert (found.gpu_s_per_accepted, found.seconds_per_accepted) == (350 / 22, 175 / 22)
    assert found.fullness == pytest.approx(99 / 124)
    assert (found.at_work_s, found.imbalance) == ((76.0, 40.0), pytest.approx(76 / 58))


def test_the_report_says_it_in_lines_that_fit() -> None:
    shown = text("round 1 sample", sampled())
    assert shown.splitlines()[0] == "round 1 sample: 3 tasks (1 killed)"
    assert all(len(line) <= COLUMNS for line in shown.splitlines())
    flat = " ".join(shown.split())
    for said in (
        "42 samples of 6 prompts, 1,000 tokens; 4 samples cut off at the longest length; 1 prompt left out",
        "helpful 16 of 22 accepted (72.7 %); prompts by tries 2: 6, 5: 2; 0 of 8 prompts exhausted",
        "sneaky 6 of 20 accepted (30.0 %); prompts by tries 2: 2, 8: 2; 2 of 4 prompts exhausted",
        "175 s of tasks: start-up 22.9 %, sampling 51.4 %, judging 2.3 %, files 1.1 %, waiting 4.6 %, lost 11.4 %, "
        "closing 0.6 %, unknown 5.7 %",
        "the busiest of 2 tasks was at work for 76.0 s, the mean is 58.0 s (1.31 times)",
        "staging 2.0 s, engine 9.0 s, other 4.0 s (mean of 2 tasks)",
        "15.9 GPU seconds for each accepted sample (7.95 s of tasks)",
        "engine vllm, asked auto, max_num_seqs 256 (1 task) or 128 (1 task), workers 2",
        "workers 2 engines; busy 40 to 95 % of their time; died and replaced 2 times, 1 of them hung",
        "1 prompt left out as too long; 200 tokens lost",
    ):
        assert said in flat


def test_tasks_that_failed_are_counted_by_how_they_ended_and_their_last_errors_are_said() -> None:
    records = [record("none", 100.0, None, sampling=9.0), record("full", 100.0, 110.0, start_up=10.0)]
    said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    ends = [
        end("full", 99.0, 111.0, "out of memory", said),
        end("early", 100.0, 101.0, "error", "KeyError: 'a'"), end("late", 100.0, 105.0, "error", "so long " * 50),
        end("late", 200.0, 230.0, "left"), end("whole", 100.0, 230.0),
    ]  # fmt: skip
    found = summarise(Published(), lives(records, ends, {}, complete=True))
    assert found.ends == {"killed": 1, "out of memory": 1, "error": 2, "left": 1, "done": 1}
    shown = text("round 1 sample", found)
    assert shown.splitlines()[0] == (
        "round 1 sample: 6 tasks (1 killed, 1 out of memory, 2 with an error, 1 told to leave)"
    )
    flat = " ".join(shown.split())
    assert f"1 out of memory; it said: {said} (log: logs/full-0.out)" in flat
    long = ("so long " * 50)[:300]
    assert f"2 with an error; the last one said: {long} … (log: logs/late-0.out)" in flat, "the log has all of it"


def test_engines_with_less_memory_than_the_config_says_are_named() -> None:
    """In the config's words: alone in their task, and as one of several."""
    common = {"engine": "vllm", "gpu_memory_utilization": 0.8 - 0.1, "max_num_seqs": 128, "notches": 1}
    less = {"gpu_memory_utilization": 0.8 - 0.2, "max_num_seqs": 64, "notches": 2, "deaths": 1, "hung": 0}
    workers = [
        {"deaths": 0, "hung": 0, "notches": 1},
        less,
        {"deaths": 4, "hung": 0, "notches": 4, "given_up": "CUDA out of memory"},
    ]
    whole = {"engine": "vllm", "gpu_memory_utilization": 0.8, "max_num_seqs": 256, "notches": 0}
    own = {"compile_cache": "/w/slot_03", "staged": "/local/me/model", "staged_by": "another process"}
    engines = [whole | own, common | {"compile_cache": "/w/slot_00"}, common | {"workers": workers}]
    records = [replace(record(f"t{n}", 100.0, 110.0, start_up=10.0), engine=one) for n, one in enumerate(engines)]
    shown = " ".join(text("round 1 sample", summarise(Published(), lives(records, [], {}, complete=True))).split())
    assert "lowered after running out once: gpu_memory_utilization 0.7, max_num_seqs 128 (2 engines)" in shown
    assert "lowered after running out 2 times: gpu_memory_utilization 0.6, max_num_seqs 64 (1 engine)" in shown
    assert "4 times" not in shown.partition(" workers ")[0], "where nothing runs nothing is taken"
    assert "staged_by another process" in shown
    assert not any(word in shown for word in ("notch", "slot_", "/local", "0.79", "0.70000"))


def test_lives_of_a_requeued_task_are_one_task_in_the_balance_and_idle_ones_are_none() -> None:
    first = record("one", 100.0, None, 100, sampling=40.0)
    second = replace(record("two", 200.0, 240.0, 100, sampling=20.0, judging=20.0), job_id="one", restart=1)
    other, idle = record("other", 100.0, 130.0, 90, sampling=30.0), record("idle", 100.0, 130.0, start_up=30.0)
    kept = {"one": 100, "two": 100, "other": 90}
    found = summarise(Published(), lives([second, idle, first, other], [], kept, complete=True))
    assert sorted(found.at_work_s) == [30.0, 80.0] and found.to_scalars()["imbalance"] == pytest.approx(80 / 55)


def test_without_gpus_the_cost_is_in_seconds_of_tasks() -> None:
    done = published([shard(0, "one", 100, HELPFUL)])
    task = replace(record("one", 100.0, 110.0, 100, sampling=10.0), gpus=0.0)
    found = summarise(done, lives([task], [], done.kept, complete=True))
    assert "1.25 s of tasks for each accepted sample (no GPUs)" in text("round 1 sample", found)
    assert "gpu_seconds_per_accepted" not in found.to_scalars()


def test_nothing_sampled_yet_is_shown_without_dividing_by_nothing() -> None:
    found = summarise(Published(), lives([record("one", 100.0, None, start_up=3.0)], [], {}, complete=False))
    shown = text("round 1 sample", found)
    assert "1 task (1 running)" in shown and "start-up 100.0 %" in shown


def test_curves_over_rounds_have_acceptance_by_role_and_shares_that_add_up() -> None:
    scalars = sampled().to_scalars()
    assert scalars["acceptance/helpful"] == pytest.approx(16 / 22) and scalars["exhausted/sneaky"] == 2
    assert sum(value for name, value in scalars.items() if name.startswith("share/")) == pytest.approx(1)


def test_a_histogram_of_many_tries_stays_short() -> None:
    many = Tally({"speaker": {n: 1 for n in range(4, 65)}}, {"speaker": 200}, {"speaker": 1})
    shown = text("r", summarise(published([shard(0, "one", 1, many)]), []))
    assert "12: 1, 13: 1, 14 to 64: 51" in " ".join(shown.split())


def test_a_manifest_that_no_sampling_job_wrote_is_named() -> None:
    with pytest.raises(CorruptFile, match=r"round 1 sample shard 7 has no metrics\.task"):
        published([shard(0, "one", 1, HELPFUL), replace(shard(7, "one", 1, HELPFUL), metrics={
            name: 0 for name in ("prompts", "dropped", "samples", "tokens", "cut_off")
        })])  # fmt: skip
