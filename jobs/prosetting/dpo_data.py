"""Job body of the dpo_data stage: pairs for the solver's training, texts for the generator's, from graded attempts."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.orchestrate import curves
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.orchestrate.placing import commit_placed
from hpc_rl.recipes.prosetting import GENERATOR, PAIRS, VALIDATION
from hpc_rl.run.garbage import seldom_collected

if TYPE_CHECKING:
    from hpc_rl.data.dpo import Known, Pairing
    from hpc_rl.data.generator import Parents
    from hpc_rl.data.row_writer import RowWriter

log = logging.getLogger("hpc_rl")

FILES = {"train": PAIRS, "validation": VALIDATION}
"""Of pairs, by the split of their questions."""
READ_AT_ONCE = 512


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.dpo_data --workspace W --round R`"""
    job = open_job("dpo_data", argv)
    assert isinstance(job.config, ProSettingConfig)
    with seldom_collected():
        for shard in job.shards():
            make(job, job.config, shard)
    return 0


def make(job: Job, config: ProSettingConfig, shard: Shard) -> None:
    """Write the round's data sets, and commit them."""
    from hpc_rl.data import dpo, generator
    from hpc_rl.data.row_writer import RowWriter
    from hpc_rl.run import atomic
    from jobs.prosetting.solutions import Solutions

    names = (*FILES.values(), GENERATOR, "dataset_info.json")
    written = {name: shard.output(name) for name in names}
    known, broken = dpo.Known(), broken_in(job)
    solutions = Solutions(config.pairs.reference_solutions, config.grade.answers, config.solver)
    pairing = dpo.Pairing(job.round, config.run.seed, config.pairs.max_per_question, known, solutions)
    with (
        RowWriter(written[PAIRS], dpo.schema()) as train,
        RowWriter(written[VALIDATION], dpo.schema()) as validation,
        RowWriter(written[GENERATOR], generator.schema()) as texts,
    ):
        to = {"train": train, "validation": validation}
        rounds = {split: taken_over(job, config, split, to[split], known, broken) for split in FILES}
        before = {split: to[split].rows for split in FILES}
        more = pair_up(job, config, pairing, broken, to, texts)
    for split in FILES:
        rounds[split] |= {job.round} if to[split].rows > before[split] else set()
    metrics = {
        **{f"pairs_{split}": to[split].rows for split in FILES},
        **pairing.counts,
        **solutions.counts,
        **more,
        "generator_texts": texts.rows,
    }
    info = {
        "round": job.round,
        "window": config.data_window,
        "rounds": {split: sorted(rounds[split]) for split in FILES},
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
    curves.write(job, {f"pairs/{name}": metrics[f"pairs_{name}"] for name in (*FILES, "new")})
    folder = job.ws.dataset_dir(job.round)
    made_from = {"window": config.data_window}
    commit_placed(shard, {path: folder / name for name, path in written.items()}, made_from=made_from, metrics=metrics)


def broken_in(job: Job) -> frozenset[str]:
    """The questions whose reference answer was found wrong in this round: nothing is learned from them."""
    from hpc_rl.grading.broken import iter_broken

    paths = [done.path("broken.parquet") for done in job.inputs(job.round, "grade")]
    return frozenset(one.question_id for one in iter_broken(paths))


def pair_up(
    job: Job, config: ProSettingConfig, pairing: Pairing, broken: frozenset[str], to: Mapping[str, RowWriter],
    texts: RowWriter,
) -> dict[str, int]:  # fmt: skip
    """Write the pairs of the round's questions, and texts for the generator; how many of either are no use."""
    from hpc_rl.data.attempts import pieces
    from hpc_rl.data.control_tokens import ControlTokens
    from hpc_rl.data.generator import text_of
    from hpc_rl.data.questions import chat, iter_questions

    pool = job.input(job.round - 1, "pool", 0).path("questions.parquet")
    parents, questions = parents_of(job, pool), enumerate(iter_questions(pool))
    control = ControlTokens(Path((config.generator or config.solver).path))
    counts = {"broken": 0, "generator_unusable": 0}
    for piece in pieces(done.path("graded.parquet") for done in job.inputs(job.round, "grade")):
        made: dict[str, list[Any]] = {split: [] for split in FILES}
        for answered in piece.answered():
            question = next(one for place, one in questions if place == answered.place)
            if question.question_id in broken:
                counts["broken"] += 1
                continue
            pairs = pairing.pairs(question, chat(config.questions, question.question), answered.attempts)
            made[question.split].extend((answered, pair) for pair in pairs)
            rate = answered.attempts.success_rate
            if question.parent_id is not None and rate is not None:
                text = text_of(job.round, question, parents[question.parent_id], rate)
                if any(control.are_in(said) for said in (text.completion, *(m["content"] for m in text.prompt))):
                    counts["generator_unusable"] += 1
                else:
                    texts.add(text)
        for split, pairs_of_piece in made.items():
            if pairs_of_piece:
                to[split].add_table(piece.pairs(pairs_of_piece))
    return counts


def taken_over(
    job: Job, config: ProSettingConfig, split: str, to: RowWriter, known: Known, broken: frozenset[str]
) -> set[int]:
    """Copy the pairs of earlier rounds, where the window has them, but for those of broken questions; their rounds."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from hpc_rl.data.dpo import key_of

    rounds: set[int] = set()
    if config.data_window == "last" or job.round == 1:
        return rounds
    gone = pa.array(sorted(broken), pa.string())
    with pq.ParquetFile(job.input(job.round - 1, "dpo_data", 0).path(FILES[split])) as file:
        for batch in file.iter_batches(READ_AT_ONCE):
            kept = batch.filter(pc.invert(pc.is_in(batch["question_id"], gone)))
            to.add_table(pa.Table.from_batches([kept]))
            said = zip(*(kept[name].to_pylist() for name in ("prompt", "chosen", "rejected")), strict=True)
            known.add([key_of(*one) for one in said])
            rounds.update(kept["round"].to_pylist())
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
