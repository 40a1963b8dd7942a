"""One claimed shard while it is sampled, and how it is published: its tasks, what was drawn, what is in flight."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.engines.base import Completion
from hpc_rl.grading.samples import Sample, write_samples
from hpc_rl.sampling.claiming import Shard
from hpc_rl.sampling.rules import Outcome, Rule
from hpc_rl.sampling.tally import Tally
from hpc_rl.sampling.tasks import Attempt, Task, TaskQueue


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
    """

    def __init__(
        self, shard: Shard, number: int, tasks: Sequence[Task], rules: Mapping[str, Rule], dropped: int
    ) -> None:
        self.shard, self.number, self.dropped = shard, number, dropped
        self.since = time.monotonic()
        self.in_flight: dict[str, Attempt] = {}
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
        del self.in_flight[self.key(attempt)]
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
            When the file system refuses; no part of the shard stays behind.
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
        try:
            with self.shard.create("samples.parquet") as file:
                write_samples(file, self.samples(origin), Sample)
                return self.shard.commit([file], made_from=made_from, metrics=metrics)
        except OSError as error:
            path = self.shard.output("samples.parquet")
            path.unlink(missing_ok=True)
            self.shard.abandon()
            raise WriteFailure(
                f"shard {self.shard.index} is drawn, but cannot be written to {path.parent}: {error}. Nothing of it is "
                "left behind, and shards that are published stay. Make room there and launch again: the same samples "
                "are drawn for what is missing"
            ) from error
