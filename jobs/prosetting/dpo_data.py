"""Job body of the dpo_data stage: pairs for the solver's training, texts for the generator's, from graded attempts."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.orchestrate import curves
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.orchestrate.placing import commit_placed

if TYPE_CHECKING:
    from hpc_rl.data.dpo import Attempts, Known
    from hpc_rl.data.generator import Parents
    from hpc_rl.data.row_writer import RowWriter

log = logging.getLogger("hpc_rl")

SPLITS = ("train", "validation")
READ_AT_ONCE = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.dpo_data --workspace W --round R`"""
    job = open_job("dpo_data", argv)
    assert isinstance(job.config, ProSettingConfig)
    for shard in job.shards():
        make(job, job.config, shard)
    return 0


def make(job: Job, config: ProSettingConfig, shard: Shard) -> None:
    """Write the round's data sets, and commit them."""
    from hpc_rl.data import dpo, generator
    from hpc_rl.data.control_tokens import control_tokens
    from hpc_rl.data.row_writer import RowWriter
    from hpc_rl.grading.answers import Checker
    from hpc_rl.run import atomic

    pool = job.input(job.round - 1, "pool", 0).path("questions.parquet")
    graded = [done.path("graded.parquet") for done in job.inputs(job.round, "grade")]
    names = (*(f"{split}.parquet" for split in SPLITS), "generator.parquet", "dataset_info.json")
    written = {name: shard.output(name) for name in names}
    checker = Checker(config.grade.answers) if config.pairs.reference_solutions else None
    known, parents = dpo.Known(), parents_of(job, pool)
    models = [config.solver, *([config.generator] if config.generator is not None else [])]
    solver, *writer = (control_tokens(Path(model.path)) for model in models)
    pairing = dpo.Pairing(job.round, config.run.seed, config.pairs.max_per_question, known, solver, checker)
    with (
        RowWriter(written["train.parquet"], dpo.schema()) as train,
        RowWriter(written["validation.parquet"], dpo.schema()) as validation,
        RowWriter(written["generator.parquet"], generator.schema()) as texts,
    ):
        to = {"train": train, "validation": validation}
        rounds = {split: taken_over(job, config, split, to[split], known) for split in SPLITS}
        before = {split: to[split].rows for split in SPLITS}
        unusable = pair_up(job, config, pool, graded, pairing, to, parents, texts, [t for ts in writer for t in ts])
    counts = pairing.counts
    if counts["pairs_new"]:
        for split in SPLITS:
            rounds[split] |= {job.round} if to[split].rows > before[split] else set()
    metrics = {
        **{f"pairs_{split}": to[split].rows for split in SPLITS},
        **counts,
        "generator_texts": texts.rows,
        "generator_unusable": unusable,
    }
    info = {
        "round": job.round,
        "window": config.data_window,
        "rounds": {split: sorted(rounds[split]) for split in SPLITS},
        "split": "by the question of the file that a question comes from; the same in every round",
        "max_per_question": config.pairs.max_per_question,
        "reference_solutions": config.pairs.reference_solutions,
        "columns": {"pairs": dpo.schema().names, "generator": generator.schema().names},
        "counts": metrics,
        "config": job.provenance["config"],
    }
    atomic.write_json(written["dataset_info.json"], info)
    if not train.rows:
        log.warning("no pair to train on: %s", {name: number for name, number in metrics.items() if number})
    curves.write(job, {f"pairs/{name}": metrics[f"pairs_{name}"] for name in (*SPLITS, "new")})
    folder = job.ws.dataset_dir(job.round)
    made_from = {"window": config.data_window}
    commit_placed(shard, {path: folder / name for name, path in written.items()}, made_from=made_from, metrics=metrics)


def pair_up(
    job: Job, config: ProSettingConfig, pool: Path, graded: Sequence[Path], pairing: Any, to: dict[str, RowWriter],
    parents: Parents, texts: RowWriter, control_tokens: Sequence[str],
) -> int:  # fmt: skip
    """Write the pairs of the round's questions, and texts for the generator; how many of those hold control tokens."""
    from hpc_rl.data.generator import text_of
    from hpc_rl.data.questions import chat, count_questions, iter_questions

    total, unusable = count_questions(pool), 0
    answered = attempts_of(graded)
    place, attempts = next(answered, (total, None))
    for number, question in enumerate(iter_questions(pool)):
        if place != number:
            continue  # it has no attempts
        assert attempts is not None
        if question.split in to:
            for pair in pairing.pairs(question, chat(config.questions, question.question), attempts):
                to[question.split].add(pair)
        if question.parent_id is not None and attempts.success_rate is not None:
            text = text_of(job.round, question, parents[question.parent_id], attempts.success_rate)
            said = [text.completion, *(message["content"] for message in text.prompt)]
            if any(token in one for token in control_tokens for one in said):
                unusable += 1
            else:
                texts.add(text)
        place, attempts = next(answered, (total, None))
    assert attempts is None, "attempts stand in the order of their questions"
    return unusable


def attempts_of(graded: Iterable[Path]) -> Iterator[tuple[int, Attempts]]:
    """The attempts at each question that has some, by its place in the pool; those that are left out do not count."""
    from hpc_rl.data.dpo import Attempts

    for place, rows in groupby(_rows(graded), key=lambda row: row[0]):
        answers: tuple[list[str], list[str]] = ([], [])
        for _, text, reward in rows:
            if reward is not None:
                answers[reward > 0].append(text)
        yield place, Attempts(wrong=answers[0], right=answers[1])


def _rows(graded: Iterable[Path]) -> Iterator[tuple[int, str, float | None]]:
    import pyarrow.parquet as pq

    columns = ["group", "text", "reward_correctness"]
    for path in graded:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_AT_ONCE, columns=columns):
                yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)


def taken_over(job: Job, config: ProSettingConfig, split: str, to: RowWriter, known: Known) -> set[int]:
    """Copy the pairs of earlier rounds, where the window has them; of which rounds they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hpc_rl.data.dpo import key_of

    rounds: set[int] = set()
    if config.data_window == "last" or job.round == 1:
        return rounds
    with pq.ParquetFile(job.input(job.round - 1, "dpo_data", 0).path(f"{split}.parquet")) as file:
        for batch in file.iter_batches(READ_AT_ONCE):
            to.add_table(pa.Table.from_batches([batch]))
            said = zip(*(batch[name].to_pylist() for name in ("prompt", "chosen", "rejected")), strict=True)
            known.add([key_of(*one) for one in said])
            rounds.update(batch["round"].to_pylist())
    return rounds


def parents_of(job: Job, pool: Path) -> Parents:
    """The parents of the pool's variants, from the pools that they were in."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from hpc_rl.data.generator import Parents

    wanted: dict[int, list[str]] = defaultdict(list)
    with pq.ParquetFile(pool) as file:
        for batch in file.iter_batches(READ_AT_ONCE, columns=["parent_id", "made_in"]):
            variants = batch.filter(pc.is_valid(batch["parent_id"]))
            for parent, made_in in zip(variants["parent_id"].to_pylist(), variants["made_in"].to_pylist(), strict=True):
                wanted[made_in].append(parent)
    tables = []
    for made_in, ids in sorted(wanted.items()):
        of = pa.array(ids, pa.string())
        with pq.ParquetFile(job.input(made_in - 1, "pool", 0).path("questions.parquet")) as file:
            for batch in file.iter_batches(READ_AT_ONCE, columns=["question_id", "question", "answer", "solution"]):
                tables.append(pa.Table.from_batches([batch.filter(pc.is_in(batch["question_id"], of))]))
    return Parents(tables)


if __name__ == "__main__":
    sys.exit(main())
