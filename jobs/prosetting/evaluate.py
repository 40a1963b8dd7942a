"""Job body of the evaluate stage: the solver on held-out questions, before the first and after each training."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.orchestrate import curves, evaluation
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.evaluation import Asked
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.seeds import derive

if TYPE_CHECKING:
    from hpc_rl.data.questions import Question
    from hpc_rl.engines.base import Completion, Engine
    from hpc_rl.grading.answers import Verdict

log = logging.getLogger("hpc_rl")


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.evaluate --workspace W --round R`; 75 when it is to be started anew."""
    job = open_job("evaluate", argv)
    from hpc_rl.engines.gpus import check_gpus

    check_gpus(job.config, job.stage.name)
    for shard in job.shards():
        evaluate(job, shard)
    return 0


@dataclass(frozen=True)
class Attempt:
    """One answer to a held-out question."""

    question: Question
    number: int
    completion: Completion
    verdict: Verdict

    def row(self) -> dict[str, Any]:
        """A row of evaluation.parquet."""
        return {
            "question_id": self.question.question_id,
            "attempt": self.number,
            "text": self.completion.text,
            "answer": self.verdict.answer,
            "reference": self.question.answer,
            "right": self.verdict.right,
            "finish_reason": self.completion.finish_reason,
            "tokens": len(self.completion.token_ids),
        }


@dataclass
class Score:
    """What came of the attempts. Where the rule cannot say whether one is right it counts as wrong, and is counted:
    a score never depends on a teacher."""

    attempts: int = 0
    right: int = 0
    undecided: int = 0
    truncated: int = 0
    tokens: int = 0
    asked: set[str] = field(default_factory=set)
    solved: set[str] = field(default_factory=set)

    def add(self, attempt: Attempt) -> None:
        """One more."""
        self.attempts += 1
        self.right += bool(attempt.verdict.right)
        self.undecided += attempt.verdict.right is None
        self.truncated += attempt.completion.finish_reason == "length"
        self.tokens += len(attempt.completion.token_ids)
        self.asked.add(attempt.question.question_id)
        if attempt.verdict.right:
            self.solved.add(attempt.question.question_id)

    def metrics(self, k: int) -> dict[str, float]:
        """For the manifest. `accuracy` is pass@1, the mean over all attempts at all questions; with k of them each,
        `pass_at_k` is the share of questions that one of them solves."""
        assert self.attempts, "a run without held-out questions is refused by launch"
        several = {"pass_at_k": round(len(self.solved) / len(self.asked), 4)} if k > 1 else {}
        return {
            "accuracy": round(self.right / self.attempts, 4),
            **several,
            "n_held_out": len(self.asked),
            "n_attempts": self.attempts,
            "truncated": self.truncated,
            "undecided": self.undecided,
            "mean_tokens": round(self.tokens / self.attempts, 1),
        }


def evaluate(job: Job, shard: Shard) -> None:
    """Ask, check, count; write the file, tell TensorBoard, and commit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hpc_rl.data.questions import chat, iter_questions
    from hpc_rl.engines.base import Prompt
    from hpc_rl.engines.weights import Role, weights_of

    config = job.config
    assert isinstance(config, ProSettingConfig)
    wandb = curves.find_wandb(config)
    (pool,) = job.inputs(0, "pool")
    questions = list(iter_questions(pool.path("held_out.parquet")))
    prompts = {one.question_id: Prompt(tuple(chat(config.questions, one.question))) for one in questions}
    weights = weights_of(job.ws, Role("solver", config.solver), job.round)
    checked = evaluation.check_prompts(config, config.solver, weights.base, prompts.items())
    fitted = {id: checked.fit(id, prompt) for id, prompt in prompts.items()}
    asked = [
        (one, number, Asked(one.question_id, prompt, derive(config.run.seed, job.round, "evaluate", id, number)))
        for one in questions
        if (prompt := fitted[id := one.question_id]) is not None
        for number in range(config.evaluate.samples_per_question)
    ]
    engine = evaluation.open_engine(job, config.solver, weights)
    score, started, table = Score(), time.monotonic(), shard.output("evaluation.parquet")
    with pq.ParquetWriter(table, _schema(), compression="zstd") as writer:
        for attempts in answered(config, engine, asked):
            for attempt in attempts:
                score.add(attempt)
            writer.write_table(pa.Table.from_pylist([attempt.row() for attempt in attempts], _schema()))
            shard.progress(score.attempts, len(asked))
    metrics = {
        **score.metrics(config.evaluate.samples_per_question),
        "dropped": len(checked.dropped),
        "answering_s": round(time.monotonic() - started, 2),
    }
    points = {f"evaluate/{name}": value for name, value in metrics.items()}
    curves.write(job, points)
    made_from = {"weights": weights.hash, "engine": engine.kind, "temperature": config.evaluate.temperature}
    if shard.commit([table], made_from=made_from, metrics=metrics):
        log.info("round %d: %s", job.round, metrics)
        curves.write_wandb(wandb, job, points)


def answered(
    config: ProSettingConfig, engine: Engine, asked: Sequence[tuple[Question, int, Asked]]
) -> Iterator[list[Attempt]]:
    """Answers with their verdicts, `evaluate.batch_size` at a time."""
    from hpc_rl.grading.answers import Checker, Reference

    checker, sampling, left = Checker(config.grade.answers), evaluation.sampling_of(config), iter(asked)
    references: dict[str, Reference] = {}
    while batch := list(islice(left, config.evaluate.batch_size)):
        attempts = []
        made = evaluation.complete(engine, [one for _, _, one in batch], sampling)
        for (question, number, _), completion in zip(batch, made, strict=True):
            id = question.question_id
            if id not in references:  # attempts at a question follow each other, so one is enough
                references = {id: checker.reference(question.answer)}
            cut_off = completion.finish_reason == "length"
            verdict = checker.verdict(references[id], completion.text, cut_off=cut_off)
            attempts.append(Attempt(question, number, completion, verdict))
        yield attempts


def _schema() -> Any:
    import pyarrow as pa

    types = {"attempt": pa.int32(), "right": pa.bool_(), "tokens": pa.int32()}
    names = ("question_id", "attempt", "text", "answer", "reference", "right", "finish_reason", "tokens")
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


if __name__ == "__main__":
    sys.exit(main())
