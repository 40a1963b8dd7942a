"""The sampling job, with a tiny speaker on transformers: the same samples whoever draws them, killed or not."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator

import pytest

from hpc_rl.engines.compile_cache import SlotLost
from hpc_rl.grading.samples import Sample, read_samples
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.sampling.prompts import PromptError
from hpc_rl.sampling.record import read_records
from hpc_rl.sampling.tally import Tally
from jobs import sample
from tests.forked import Forked
from tests.jobs.listening import arguments
from tests.waiting import PATIENCE_S, wait_for

SHARDS, PROMPTS, GROUP = 3, 8, 4  # 8 prompts in shards of 3

NewRun = Callable[..., Workspace]
Start = Callable[..., Forked]


def samples_of(ws: Workspace) -> list[Sample]:
    paths = [manifest.read(ws, 1, "sample", shard).path("samples.parquet") for shard in range(SHARDS)]
    return [s for path in paths for s in read_samples(path)]


def assert_the_same(ws: Workspace, other: Workspace) -> None:
    """All but the last bits of log-probabilities, which depend on the batch (`hpc_rl.engines.base`)."""
    for one, two in zip(samples_of(ws), samples_of(other), strict=True):
        assert {**vars(one), "logprobs": ()} == {**vars(two), "logprobs": ()}
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the job as a process of its own; ends what is left."""
    started = list[Forked]()

    def start_one(ws: Workspace) -> Forked:
        started.append(Forked("jobs.sample", arguments(ws), ws.root / f"task{len(started)}.out"))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def slow() -> tuple[str, ...]:
    """Settings with which a shard takes a while: long completions, few at a time."""
    return ("sample.max_tokens=64", "sample.max_num_seqs=4")


def test_a_killed_task_and_one_that_is_told_to_leave_change_nothing(
    new_run: NewRun, start: Start, slow: tuple[str, ...]
) -> None:
    undisturbed = new_run(*slow)
    assert sample.main(arguments(undisturbed)) == 0
    ws = new_run(*slow, "run.lease_ttl_s=600")
    for end in (Forked.kill, Forked.terminate):
        before = len(manifest.done_shards(ws, 1, "sample"))
        task = start(ws)
        wait_for(lambda before=before: len(manifest.done_shards(ws, 1, "sample")) > before, "a shard", of=task)
        end(task)
        assert task.wait(PATIENCE_S) in (-9, 143)
    assert len(manifest.done_shards(ws, 1, "sample")) == 2
    assert start(ws).wait(PATIENCE_S) == 0
    assert_the_same(ws, undisturbed)
    assert len({manifest.read(ws, 1, "sample", shard).metrics["task"] for shard in range(SHARDS)}) == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_a_killed_task_on_vllm_changes_nothing(new_run: NewRun, start: Start, slow: tuple[str, ...]) -> None:
    undisturbed, ws = (
        new_run(*slow, "sample.engine=vllm", "sample.max_num_seqs=2", "run.lease_ttl_s=600") for _ in range(2)
    )
    task = start(ws)
    wait_for(lambda: manifest.done_shards(ws, 1, "sample"), "a shard", of=task)
    task.kill()
    assert task.wait(PATIENCE_S) == -9
    assert 0 < len(manifest.done_shards(ws, 1, "sample")) < SHARDS
    for left in (ws, undisturbed):
        assert start(left).wait(PATIENCE_S) == 0
    assert_the_same(ws, undisturbed)
    assert len({manifest.read(ws, 1, "sample", shard).metrics["task"] for shard in range(SHARDS)}) == 2
    for shard in range(SHARDS):
        assert manifest.read(ws, 1, "sample", shard).made_from["engine"]["engine"] == "vllm"


def test_a_pool_of_engines_draws_the_same_samples(new_run: NewRun) -> None:
    one, several = new_run(), new_run("sample.data_parallel_size=2", "sample.max_num_seqs=4")
    for ws in (one, several):
        assert sample.main(arguments(ws)) == 0
    assert_the_same(one, several)
    (record,) = read_records(several.stage_dir(1, "sample"))
    assert len(record.engine["workers"]) == 2


def test_an_engine_that_may_have_other_weights_is_started_again(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stood_still(*_: object, **__: object) -> None:
        raise SlotLost("which of the two was loaded is not known")

    ws = new_run()
    with monkeypatch.context() as patch:
        patch.setattr("hpc_rl.engines.pool_opening.open_engine", stood_still)
        assert sample.main(arguments(ws)) == 75, "no fault of the program's, whose repetition would stop the run"
    assert not manifest.done_shards(ws, 1, "sample")
    assert sample.main(arguments(ws)) == 0, "all claims were given back"


def test_a_job_without_time_leaves_the_rest_to_its_next_run(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, slow: tuple[str, ...]
) -> None:
    ws = new_run(*slow)
    monkeypatch.setenv("HPC_RL_LEAVE_AT", str(time.time() - 1))
    codes = [sample.main(arguments(ws))]
    while codes[-1] == 124:
        assert len(manifest.done_shards(ws, 1, "sample")) >= len(codes), "each run gets something done"
        codes.append(sample.main(arguments(ws)))
    assert codes[-1] == 0 and len(codes) > 1
    assert len(samples_of(ws)) == PROMPTS * GROUP


def test_what_is_not_well_formed_is_drawn_again_and_what_stays_so_is_reported(new_run: NewRun) -> None:
    """A model with random weights says nothing well-formed: all tries are used up, kept for history, and none count."""
    ws = new_run("sample.accept=well_formed", "sample.max_tries_per_task=6")
    assert sample.main(arguments(ws)) == 0
    drawn = samples_of(ws)
    assert [(s.group, s.attempt) for s in drawn] == [
        (group, attempt) for group in range(PROMPTS) for attempt in range(6)
    ]
    assert not any(s.accepted for s in drawn)
    made = [manifest.read(ws, 1, "sample", shard) for shard in range(SHARDS)]
    tally = sum((Tally.from_plain(one.metrics["by_role"]) for one in made), Tally())
    assert tally == Tally({"speaker": {6: PROMPTS}}, {"speaker": 0}, {"speaker": PROMPTS})


def test_prompts_without_room_are_named_before_the_engine_starts(new_run: NewRun) -> None:
    ws = new_run("sample.max_model_len=20")
    with pytest.raises(PromptError, match=r"8 of 8 prompts are longer than the 4 tokens .*row train-.*\d+ tokens"):
        sample.main(arguments(ws))
    (record,) = read_records(ws.stage_dir(1, "sample"))
    assert not record.engine and not record.samples


def test_the_job_says_what_it_did(new_run: NewRun) -> None:
    ws = new_run()
    assert sample.main(arguments(ws)) == 0
    (record,) = read_records(ws.stage_dir(1, "sample"))
    assert record.samples == PROMPTS * GROUP and record.shards == SHARDS and record.ended is not None
    assert record.engine["engine"] == "transformers" and record.loading["engine"] > 0
    for shard in range(SHARDS):
        made = manifest.read(ws, 1, "sample", shard)
        assert made.made_from["engine"]["engine"] == "transformers"
        assert made.metrics["task"] == record.name
        assert made.metrics["prompts"] * GROUP == made.metrics["samples"] == made.metrics["accepted"]
