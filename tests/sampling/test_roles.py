"""Two roles on one tiny model, through the real stream and a real engine: who is accepted, tried again, given up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.grading.samples import Sample
from hpc_rl.orchestrate import job as jobs
from hpc_rl.orchestrate.job import Job
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.seeds import derive
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule
from hpc_rl.sampling.stream import Ending
from hpc_rl.sampling.tally import Tally
from hpc_rl.sampling.tasks import Task
from tests.orchestrate.shards_recipe import SHARDS
from tests.sampling.letters_task import ROUND, RUN_SEED, published, stream
from tools import tiny_chat_model

PROBLEMS, K, MOST_TRIES = 2, 2, 4
ROLES = ("helpful", "sneaky")


def answer(text: str) -> str | None:
    """The last letter of a solution; None where there is none."""
    return next((letter for letter in reversed(text.lower()) if "a" <= letter <= "z"), None)


class AnswerSource:
    """Asks for a letter before n, say. `helpful` is to give one, `sneaky` a wrong one; without a letter both fail."""

    rules: Mapping[str, Rule] = {role: KAccepted(K, MOST_TRIES) for role in ROLES}
    sampling = Sampling(1.0, max_tokens=2)

    def tasks(self, shard: int) -> list[Task]:
        groups = range(PROBLEMS * shard, PROBLEMS * (shard + 1))
        return [
            Task(f"r01-p{group}-{role}", role, group, f"p{group}", Prompt.of(f"{role}: name a letter, number {group}."))
            for group in groups
            for role in ROLES
        ]

    def dropped(self, shard: int) -> int:
        return 0

    def judge(self, task: Task, completion: Completion) -> Outcome:
        given = answer(completion.text)
        return Outcome(given is not None and (given < self.bound(task.group)) == (task.role == "helpful"))

    @staticmethod
    def bound(group: int) -> str:
        return "aekpuz"[group % 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model.write(tmp_path_factory.mktemp("model"), seed=2)


@pytest.fixture(scope="module")
def sampled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("run")
    file = folder / "roles.yaml"
    file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: roles, rounds: 1, seed: 3}\n")
    run = open_run(configs.load(file, (), {}, folder / "run", cwd=folder), file)
    job = jobs.load(run.ws.root, 1, "cut")
    with ExitStack() as stack:
        engine = TransformersEngine(str(model), max_num_seqs=16)
        assert stream(job, stack, engine, source=AnswerSource()).run() is Ending.DONE
    return job


def by_task(job: Job) -> dict[tuple[str, str], list[Sample]]:
    found = defaultdict(list)
    for sample in published(job):
        found[sample.row_id, sample.role].append(sample)
    assert set(found) == {(f"p{group}", role) for group in range(SHARDS * PROBLEMS) for role in ROLES}
    return found


def test_each_role_keeps_what_it_is_asked_for(sampled: Job) -> None:
    """V2: helpful a correct answer, sneaky a wrong one, nobody a solution without an answer."""
    answers = [(s, answer(s.text)) for s in published(sampled)]
    for s, given in answers:
        right = given is not None and given < AnswerSource.bound(s.group)
        assert s.accepted == (given is not None and right == (s.role == "helpful")), s
    assert any(given is None for _, given in answers) and {s.role for s, _ in answers if s.accepted} == set(ROLES)


def test_each_task_is_drawn_until_k_count_or_its_tries_are_used_up(sampled: Job) -> None:
    numbers = []
    for samples in by_task(sampled).values():
        assert [s.attempt for s in samples] == list(range(len(samples)))
        accepted = sum(s.accepted for s in samples)
        assert (accepted == K and samples[-1].accepted) or (accepted < K and len(samples) == MOST_TRIES)
        numbers.append(len(samples))
    assert {K, K + 1, MOST_TRIES} <= set(numbers)


def test_a_retry_has_a_new_seed_and_is_what_it_is_when_it_is_drawn_alone(sampled: Job, model: Path) -> None:
    """V3: the seed comes from run seed, round, role, problem and attempt."""
    prompts = {task.id: task.prompt for shard in range(SHARDS) for task in AnswerSource().tasks(shard)}
    samples = published(sampled)
    assert all(s.seed == derive(RUN_SEED, ROUND, s.role, s.row_id, s.attempt) for s in samples)
    assert len({s.seed for s in samples}) == len(samples) == len({s.sample_id for s in samples})
    engine = TransformersEngine(str(model), max_num_seqs=1)
    retries = [s for s in samples if s.attempt >= K]
    requests = [Request(prompts[s.sample_id.rpartition("-g")[0]], s.seed) for s in retries]
    alone = generate(engine, requests, AnswerSource.sampling)
    assert len(retries) > SHARDS and [made.token_ids for made in alone] == [s.token_ids for s in retries]


def test_tasks_that_were_given_up_are_reported_by_role(sampled: Job) -> None:
    """V4."""
    made = [manifest.read(sampled.ws, 1, "cut", shard) for shard in range(SHARDS)]
    tally = sum((Tally.from_plain(one.metrics["by_role"]) for one in made), Tally())
    for role in ROLES:
        histories = [samples for (_, of), samples in by_task(sampled).items() if of == role]
        given_up = [samples for samples in histories if sum(s.accepted for s in samples) < K]
        assert tally.exhausted[role] == len(given_up) > 0
        assert tally.accepted[role] == sum(s.accepted for samples in histories for s in samples)
        assert tally.attempts(role) == sum(map(len, histories))
