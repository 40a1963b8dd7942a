"""One claimed shard while it is sampled, and how it is published: its tasks, what was drawn, what is in flight."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hpc_rl.engines.base import Completion
from hpc_rl.grading.samples import Sample, write_samples
from hpc_rl.sampling.claiming import Shard
from hpc_rl.sampling.rules import Outcome, Rule
from hpc_rl.sampling.tally import Tally
from hpc_rl.sampling.tasks import Attempt, Task, TaskQueue

FILE = "samples.parquet"
"""What the name of a shard's output ends with."""


class WriteFailure(RuntimeError):
    """A shard that is drawn and cannot be written; the message says where, why, and what to do."""


@dataclass(frozen=True)
class Origin:
    """From what a task's samples are drawn.

    Attributes
    ----------
    run_seed, round
        What their seeds are derived from, with role, row and attempt.
    weights_hash
        Stored with every sample.
    task
        Name of the array task, in the manifests of its shards.
    made_from
        What else the manifests say about it.
    """

    run_seed: int
    round: int
    weights_hash: str
    task: str
    made_from: Mapping[str, Any] = field(default_factory=dict)


class AtWork:
    """A shard from its claim to its file.

    Parameters
    ----------
    number
        Unique in this process, also when a shard is claimed again.
    dropped
        Prompts that are left out of it.
    is_copy
        Somebody else is at it too.
    """

    def __init__(
        self,
        shard: Shard,
        number: int,
        tasks: Sequence[Task],
        rules: Mapping[str, Rule],
        dropped: int,
        is_copy: bool,
    ) -> None:
        self.shard, self.number, self.dropped, self.is_copy = shard, number, dropped, is_copy
        self.since = time.monotonic()
        self.in_hand: set[str] = set()  # keys of what is drawn or waits to be
        self.tokens = 0
        self._queue = TaskQueue(tasks, rules)
        self._drawn: list[tuple[Attempt, Completion]] = []

    def start(self) -> list[Attempt]:
        """The first attempts."""
        return self._queue.start()

    def key(self, attempt: Attempt) -> str:
        """What the engine calls it."""
        return f"{self.number}/{attempt.id}"

    def finished(self, attempt: Attempt, completion: Completion, outcome: Outcome) -> list[Attempt]:
        """Keep a completion; the attempts to draw because of it."""
        self._drawn.append((attempt, completion))
        self.tokens += len(completion.token_ids)
        return self._queue.finished(attempt, outcome)

    @property
    def done(self) -> bool:
        """True when its last sample is there."""
        return self._queue.done

    @property
    def drawn(self) -> int:
        """Samples so far."""
        return len(self._drawn)

    def samples(self, origin: Origin) -> list[Sample]:
        """All attempts, accepted or not; the shard must be done."""
        kept = {task.id: frozenset(self._queue.kept(task)) for task in self._queue.tasks}
        return [
            Sample(
                sample_id=attempt.id,
                row_id=attempt.task.row_id,
                role=attempt.task.role,
                group=attempt.task.group,
                attempt=attempt.number,
                accepted=attempt.number in kept[attempt.task.id],
                prompt_token_ids=made.prompt_token_ids,
                token_ids=made.token_ids,
                logprobs=made.logprobs,
                text=made.text,
                finish_reason=made.finish_reason,
                seed=attempt.seed(origin.run_seed, origin.round),
                weights_hash=origin.weights_hash,
            )
            for attempt, made in self._drawn
        ]

    def publish(self, origin: Origin) -> bool:
        """Write the shard's file and commit it; False when somebody else was faster.

        Raises
        ------
        WriteFailure
            When the file system refuses.
        """
        tally = Tally.of(self._queue)
        metrics = {
            "task": origin.task,
            "prompts": len({task.group for task in self._queue.tasks}),
            "dropped": self.dropped,
            "samples": len(self._drawn),
            "tokens": self.tokens,
            "cut_off": sum(made.finish_reason == "length" for _, made in self._drawn),
            "accepted": sum(tally.accepted.values()),
            "exhausted": sum(tally.exhausted.values()),
            "by_role": tally.to_plain(),
        }
        made_from = {
            "weights": origin.weights_hash,
            "seeds": "derive(run seed, round, role, row id, attempt)",
            "roles": sorted(tally.tries),
            **origin.made_from,
        }
        path = self.shard.output(FILE)
        try:
            file = self._write(origin)
        except OSError as error:
            with suppress(OSError):  # nobody reads it, and what counts is said below
                path.unlink(missing_ok=True)
            raise self._failure(path, error) from error
        with file:
            try:
                return self.shard.commit([file], made_from=made_from, metrics=metrics)
            except OSError as error:  # the file stays: who knows whether its manifest is there
                raise self._failure(path, error) from error

    def _write(self, origin: Origin) -> BinaryIO:
        with ExitStack() as stack:
            file = stack.enter_context(self.shard.create(FILE))
            write_samples(file, self.samples(origin), Sample)
            file.flush()
            os.fsync(file.fileno())  # a full disk may say so only now
            stack.pop_all()
        return file

    def _failure(self, path: Path, error: OSError) -> WriteFailure:
        return WriteFailure(
            f"shard {self.shard.index} is drawn, but cannot be written to {path.parent}: {error}. "
            "Shards that are published stay. Make room there and launch again: the same samples are drawn for what is "
            "missing"
        )
