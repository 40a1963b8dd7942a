"""`jobs.sample.sample` with a source of another recipe, texts and two roles: its prompts and stops are checked too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sums_recipe import ROLE, Sums, SumsConfig, sampling
from hpc_rl import config as configs
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Prompt
from hpc_rl.grading.samples import Sample, read_samples
from hpc_rl.orchestrate.job import Job, load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.sampling.prompts import PromptError
from hpc_rl.sampling.record import read_records
from hpc_rl.sampling.tasks import Task
from jobs.sample import sample

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS, SHARDS, LONG = 8, 3, 4  # the long row is the second of the shard of 3, 4 and 5
STOP = ("so<|im_end|>",)
SHORT_ENOUGH = "sample.max_model_len=400"

NewSums = Callable[..., Job]


class Checked(Sums):
    """Sums that one role answers and another one checks; for the latter row 4 is a long one."""

    def __init__(self, options: SampleConfig, stop: tuple[str, ...] = ()) -> None:
        super().__init__(options, 1)
        self.rules = {role: self.rules[ROLE] for role in (ROLE, "checker")}
        self.sampling = replace(self.sampling, stop=stop)

    def tasks(self, shard: int) -> Sequence[Task]:
        return [task for solver in super().tasks(shard) for task in (solver, self._checker(solver))]

    def _checker(self, solver: Task) -> Task:
        asked = Prompt.of("ring " * 500 * (solver.group == LONG) + "Is the ring red?")
        return replace(solver, id=f"{solver.id}-checker", role="checker", prompt=asked)


@pytest.fixture
def new_sums(models: Path, tmp_path: Path) -> NewSums:
    """Make a run of benchmarks/sums.yaml with the tiny speaker; the job of its sample stage."""
    made: list[Path] = []

    def make(*settings: str) -> Job:
        root = tmp_path / f"sums{len(made)}"
        made.append(root)
        small = (
            f"speaker.path={models / 'speaker'}", "sample.engine=transformers", f"sample.prompts_per_round={ROWS}",
            "sample.samples_per_prompt=2", "sample.shard_size=3", "sample.max_tokens=8", "sample.max_model_len=null",
            "run.linger_s=1",
        )  # fmt: skip
        file = REPOSITORY / "benchmarks/sums.yaml"
        open_run(configs.load(file, [*small, *settings], {}, root, cwd=REPOSITORY), file)
        job = load(root, 1, "sample")
        job.folder.mkdir(parents=True, exist_ok=True)
        return job

    return make


def source(job: Job) -> Checked:
    assert isinstance(job.config, SumsConfig)
    return Checked(job.config.sample)


def stopping_source(job: Job) -> Checked:
    assert isinstance(job.config, SumsConfig)
    return Checked(job.config.sample, stop=STOP)


def run(job: Job, source: str = "source") -> int:
    config = job.config
    assert isinstance(config, SumsConfig)
    return sample(job, replace(sampling(config, job.stage.id), source=f"tests.jobs.test_any_recipe:{source}"))


def drawn(job: Job) -> list[Sample]:
    made = [manifest.read(job.ws, 1, "sample", shard).path("samples.parquet") for shard in range(SHARDS)]
    return [one for path in made for one in read_samples(path)]


def counts(job: Job) -> list[tuple[int, int]]:
    """Prompts and dropped ones of each shard."""
    made = [manifest.read(job.ws, 1, "sample", shard).metrics for shard in range(SHARDS)]
    return [(one["prompts"], one["dropped"]) for one in made]


def plain(samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    return [(one.sample_id, one.role, one.group, one.seed, one.prompt_token_ids) for one in samples]


def assert_no_engine_was_started(job: Job) -> None:
    assert not manifest.done_shards(job.ws, 1, "sample")
    (record,) = read_records(job.folder)
    assert not record.engine and not record.loading


def test_a_row_that_is_too_long_is_named_before_the_engine_starts(new_sums: NewSums) -> None:
    job = new_sums(SHORT_ENOUGH)
    with pytest.raises(PromptError, match=r"1 of 16 prompts .* than the 392 tokens .* row 000004: \d+ .*long_prompts"):
        run(job)
    assert_no_engine_was_started(job)


def test_a_row_that_is_too_long_is_dropped_for_all_roles_and_counted(new_sums: NewSums) -> None:
    whole, job = new_sums(), new_sums(SHORT_ENOUGH, "sample.long_prompts=drop")
    assert [run(whole), run(job)] == [0, 0]
    assert plain(drawn(job)) == plain([one for one in drawn(whole) if one.group != LONG])
    assert len(drawn(whole)) == ROWS * 2 * 2
    assert counts(whole) == [(3, 0), (3, 0), (2, 0)]
    assert counts(job) == [(3, 0), (2, 1), (2, 0)]


def test_a_text_that_is_too_long_is_cut_on_the_left(new_sums: NewSums) -> None:
    whole, job = new_sums(), new_sums(SHORT_ENOUGH, "sample.long_prompts=truncate_left")
    assert [run(whole), run(job)] == [0, 0]
    cut = [one.sample_id for one in drawn(whole) if one.group == LONG and one.role == "checker"]
    assert len(cut) == 2
    expected = [
        replace(one, prompt_token_ids=one.prompt_token_ids[-392:]) if one.sample_id in cut else one
        for one in drawn(whole)
    ]
    assert all(len(one.prompt_token_ids) == 392 for one in expected if one.sample_id in cut)
    assert plain(drawn(job)) == plain(expected)
    assert counts(job) == [(3, 0), (3, 0), (2, 0)]


def test_a_stop_that_no_completion_can_hold_is_refused_before_the_engine_starts(new_sums: NewSums) -> None:
    job = new_sums()
    with pytest.raises(PromptError, match=r"the stop 'so<\|im_end\|>' holds the control token <\|im_end\|>"):
        run(job, "stopping_source")
    assert_no_engine_was_started(job)
    assert run(job) == 0 and len(drawn(job)) == ROWS * 2 * 2
