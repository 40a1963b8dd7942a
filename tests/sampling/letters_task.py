"""A sampling task on the engine of letters: real claims, real files, real processes, and no seconds of loading.

Each shard has three rows, and each row two roles: `vowel` wants a text with an a or an e, `plain` one without. Run as
`python -m tests.sampling.letters_task --workspace W --round 1 --stage cut`, with its settings as JSON in LETTERS.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from hpc_rl.cluster.walltime import Deadline
from hpc_rl.engines.base import Completion, Engine, Prompt, Request, Sampling, generate
from hpc_rl.grading.samples import Sample, read_samples
from hpc_rl.orchestrate.job import Job, open_job
from hpc_rl.run import manifest
from hpc_rl.run.presence import PREFIX
from hpc_rl.run.shard_leases import leases_of
from hpc_rl.sampling.at_work import Origin
from hpc_rl.sampling.record import Recorder
from hpc_rl.sampling.rules import KAccepted, Outcome, Rule
from hpc_rl.sampling.stream import Ending, Stream
from hpc_rl.sampling.tasks import Task
from tests.engines.letters import LettersEngine
from tests.orchestrate.shards_recipe import SHARDS
from tests.waiting import wait_for

ROWS, ROLES, K, MOST_TRIES = 3, ("plain", "vowel"), 2, 5
ROUND, RUN_SEED, WEIGHTS = 1, 3, "w"
SAMPLING = Sampling(1.0, max_tokens=12)


class LettersSource:
    """See the module. Row 1 of every shard in `without` is left out; shards in `empty` have no row at all."""

    rules: Mapping[str, Rule] = {role: KAccepted(K, MOST_TRIES) for role in ROLES}
    sampling = SAMPLING

    def __init__(
        self, without: Sequence[int] = (), empty: Sequence[int] = (), refused: int | None = None, round: int = ROUND
    ) -> None:
        self.round = round
        self._without, self._empty, self._refused = frozenset(without), frozenset(empty), refused

    def tasks(self, shard: int) -> list[Task]:
        rows = [] if shard in self._empty else [row for row in range(ROWS) if row != 1 or shard not in self._without]
        return [
            Task(
                f"r{self.round:02d}-s{shard}r{row}-{role}",
                role,
                ROWS * shard + row,
                f"s{shard}r{row}",
                self._prompt(shard, row, role),
            )
            for row in rows
            for role in ROLES
        ]

    def _prompt(self, shard: int, row: int, role: str) -> Prompt:
        return Prompt.of(f"{role} {'refuse' if shard == self._refused else ''}{shard} {'x' * row}")

    def dropped(self, shard: int) -> int:
        return ROWS - len(self.tasks(shard)) // len(ROLES)

    def judge(self, task: Task, completion: Completion) -> Outcome:
        return Outcome(bool(completion.text) and (set(completion.text) & set("ae") != set()) == (task.role == "vowel"))


def one_by_one(source: LettersSource, shards: Sequence[int] = range(SHARDS)) -> list[Sample]:
    """What a run must have published: each attempt drawn alone, one after the other, until K count."""
    engine, found = LettersEngine(1, 0.0, None), []
    for task in (task for shard in shards for task in source.tasks(shard)):
        counted = number = 0
        while counted < K and number < MOST_TRIES:
            seed = _seed(task, number, source.round)
            (made,) = generate(engine, [Request(task.prompt, seed)], SAMPLING)
            accepted = source.judge(task, made).accepted
            found.append(Sample(
                f"{task.id}-g{number}", task.row_id, task.role, task.group, number, accepted, made.prompt_token_ids,
                made.token_ids, made.logprobs, made.text, made.finish_reason, seed, WEIGHTS,
            ))  # fmt: skip
            counted, number = counted + accepted, number + 1
    return found


def _seed(task: Task, number: int, round: int) -> int:
    from hpc_rl.run.seeds import derive

    return derive(RUN_SEED, round, task.role, task.row_id, number)


def published(job: Job, shards: Sequence[int] = range(SHARDS)) -> list[Sample]:
    """What is in the files that manifests name, shard by shard; log-probabilities to 6 digits (files have 32 bits)."""
    found = []
    for shard in shards:
        path = manifest.read(job.ws, job.round, job.stage.name, shard).path("samples.parquet")
        found += read_samples(path)
    return found


def plain(samples: Sequence[Sample]) -> list[tuple[Any, ...]]:
    """All of samples but their log-probabilities, which files hold in 32 bits."""
    return [tuple(value for name, value in vars(sample).items() if name != "logprobs") for sample in samples]


def stream(job: Job, stack: ExitStack, engine: Engine, **settings: Any) -> Stream:
    """The stream of one task; `settings` override those of a quiet task that waits for nobody."""
    claims = settings.pop("claims", None) or stack.enter_context(job.claims())
    token = settings.pop("token", None) or claims.token
    task = stack.enter_context(Recorder(job.folder, token))
    options = {"deadline": Deadline(), "linger_s": 0.0, "speculate": False, **settings}
    source = options.pop("source", None) or LettersSource(round=job.round)
    open_engine = options.pop("open_engine", None) or (lambda: engine)
    return Stream(claims, open_engine, source, Origin(RUN_SEED, job.round, WEIGHTS, token), task, **options)


def main() -> int:
    """One task; 124 when its time was too short."""
    given = json.loads(os.environ.get("LETTERS", "{}"))
    job = open_job("cut")
    job = replace(job, stage=replace(job.stage, shards=given.get("shards", SHARDS)))
    engine = LettersEngine(given.get("capacity", 4), given.get("pause_s", 0.002), None)
    with ExitStack() as stack:
        claims = stack.enter_context(job.claims())
        together = given.get("together", 1)
        wait_for(lambda: len(list(leases_of(job.folder).glob(f"{PREFIX}*"))) >= together, f"{together} tasks are there")
        ending = stream(
            job, stack, engine, claims=claims, token=claims.token, deadline=Deadline.of(os.environ),
            linger_s=given.get("linger_s", 5.0), speculate=given.get("speculate", False),
        ).run()  # fmt: skip
        print(f"ending: {ending.name}", flush=True)
    return 124 if ending is Ending.OUT_OF_TIME else 0


if __name__ == "__main__":
    sys.exit(main())
