"""Job body of the pool stage: the next round's questions, and what came of this round's (S9, S16).

Questions are copied as Arrow's columns; Python sees ids, zones, and the texts of new questions.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.orchestrate import curves
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.orchestrate.placing import commit_placed

if TYPE_CHECKING:
    from hpc_rl.data.pool import NextPool, Variant

log = logging.getLogger("hpc_rl")

SHOWN = 100
"""Broken questions that `results.json` names; `results.parquet` has all."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.pool --workspace W --round R`"""
    job = open_job("pool", argv)
    assert isinstance(job.config, ProSettingConfig)
    for shard in job.shards():
        make_pool(job, job.config, shard)
    return 0


def make_pool(job: Job, config: ProSettingConfig, shard: Shard) -> None:
    """Decide who is in the next pool, write it and what came of the round, and commit both."""
    from hpc_rl.data.diversity import diversity
    from hpc_rl.data.pool import next_pool
    from hpc_rl.data.questions import iter_texts
    from hpc_rl.grading.broken import iter_broken
    from hpc_rl.run import atomic

    round, ws = job.round, job.ws
    inputs = Inputs.of(job)
    roots = read_roots(inputs.pool)
    broken = list(iter_broken(inputs.broken))
    zones, unasked = read_zones(inputs.results, list(roots))
    decided = next_pool(
        list(roots),
        zones,
        {one.question_id for one in broken},
        unasked,
        read_variants(inputs.enhanced, roots),
        seen=read_keys(job.input(earlier, "pool", 0).path("questions.parquet") for earlier in range(round)),
        held_out=read_keys([job.input(0, "pool", 0).path("held_out.parquet")]),
        replay_fraction=config.pool.replay_fraction,
        max_questions=config.pool.max_questions,
        seed=config.run.seed,
        round=round,
    )
    if unasked:
        log.warning(
            "%d questions leave the pool: they were too long for the solver (sample.long_prompts)", len(unasked)
        )
    if not decided.questions:
        say_empty(round, config.run.rounds, decided)
    pool, results, summary = (shard.output(name) for name in ("questions.parquet", "results.parquet", "results.json"))
    number = write_pool(pool, inputs, decided)
    counted = write_results(results, inputs.results, decided)
    assert number == decided.questions, "each of them was found once"
    counts, measured = decided.counts, diversity(iter_texts(pool), config.run.seed)
    metrics = {
        "questions": number,
        "enhanced": len(decided.enhanced_to),
        **{fate: counts[fate] for fate in ("failed", "replay", "left", "broken", "unasked")},
        "cut": counts["cut"] + decided.variants_cut,
        "duplicates_dropped": decided.duplicates_dropped,
        "held_out_dropped": decided.held_out_dropped,
        "diversity": measured.distinct_2,
        "compression_ratio": measured.compression_ratio,
        **counted,
    }
    graded = attempts_of(job)
    folder = ws.dataset_dir(round)
    written = {
        pool: ws.dataset_dir(round + 1) / "questions.parquet",
        results: folder / "results.parquet",
        summary: folder / "results.json",
    }
    about = {
        "round": round,
        "questions": len(roots),
        "zones": counted,
        **graded,
        "next_pool": metrics,
        "broken": [vars(one) for one in broken[:SHOWN]],
        "files": {name: ws.relative(path) for name, path in files_of(job).items()},
    }
    atomic.write_json(summary, about)
    reward = {} if graded["mean_reward"] is None else {"grade/mean_reward": graded["mean_reward"]}
    points = {**reward, **{f"pool/{name}": value for name, value in metrics.items()}}
    curves.write(job, points | curves.of_sampling(job, config.sampling_stage))
    commit_placed(shard, written, made_from={}, metrics=metrics)


@dataclass(frozen=True)
class Inputs:
    """The files of a round that the next pool is made of; those of shards in shard order, which is that of places."""

    pool: Path
    results: Sequence[Path]
    enhanced: Sequence[Path]
    broken: Sequence[Path]

    @classmethod
    def of(cls, job: Job) -> Inputs:
        """Those of the round, checked against their checksums."""
        graded = job.inputs(job.round, "grade")
        return cls(
            pool=job.input(job.round - 1, "pool", 0).path("questions.parquet"),
            results=[shard.path("results.parquet") for shard in graded],
            enhanced=[shard.path("enhanced.parquet") for shard in job.inputs(job.round, "enhance")],
            broken=[shard.path("broken.parquet") for shard in graded],
        )


def read_roots(pool: Path) -> dict[str, tuple[str, str]]:
    """Id of each question of a pool, in order → its root and split."""
    return {
        id: (root, split)
        for batch in batches(pool, "question_id", "root_id", "split")
        for id, root, split in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    }


def read_zones(results: Sequence[Path], ids: Sequence[str]) -> tuple[list[Any], set[str]]:
    """The zone of each question of the pool, by place; ids of those at which no attempt was made."""
    zones: list[Any] = [None] * len(ids)
    unasked: set[str] = set()
    for path in results:
        for batch in batches(path, "question_id", "place", "zone", "attempts"):
            for id, place, zone, attempts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if place >= len(ids) or ids[place] != id or zones[place] is not None:
                    raise ValueError(f"{path}: a result of {id} at place {place}, which the pool does not have there")
                zones[place] = zone
                unasked.update((id,) if attempts == 0 else ())
    if None in zones:
        raise ValueError(
            f"no result of {ids[zones.index(None)]}, the question at place {zones.index(None)} of the pool"
        )
    return zones, unasked


def read_variants(files: Sequence[Path], roots: Mapping[str, tuple[str, str]]) -> Iterator[Variant]:
    """The new questions of a round.

    Raises
    ------
    ValueError
        For one that does not come from a question of this pool, or is not of its parent's root and split: then what is
        validated on would be trained on.
    """
    from hpc_rl.data.pool import Variant
    from hpc_rl.data.questions import text_key

    for path in files:
        for batch in batches(path, "question_id", "parent_id", "root_id", "split", "question"):
            for id, parent, root, split, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if (root, split) != (expected := roots.get(parent)):
                    what = f"{id} is a variant of {parent}, of root {root} and split {split}"
                    raise ValueError(f"{path}: {what}; expected {expected or 'a question of this round'}")
                yield Variant(id, parent, text_key(text))


def read_keys(files: Any) -> set[bytes]:
    """`text_key` of all questions of some files; about 100 bytes each."""
    from hpc_rl.data.questions import iter_texts, text_key

    return {text_key(text) for path in files for _, text in iter_texts(path)}


def batches(path: Path, *columns: str) -> Iterator[Any]:
    """Record batches of a parquet file, with these columns in this order."""
    import pyarrow.parquet as pq

    from hpc_rl.data.questions import ROWS

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=list(columns)):
            yield batch.select(list(columns))


def write_pool(path: Path, inputs: Inputs, decided: NextPool) -> int:
    """Write the next pool: those that are asked again in the order they had, then the new ones; how many."""
    from hpc_rl.data.questions import ROWS, schema
    from hpc_rl.data.regroup import write_batches

    columns = schema()
    return write_batches(path, columns, _questions(columns, inputs, decided), ROWS)


def _questions(columns: Any, inputs: Inputs, decided: NextPool) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    names, first = [field.name for field in columns], 0
    again, new = pa.array(["failed", "replay"]), pa.array(decided.enhanced_to.values(), pa.string())
    for batch in batches(inputs.pool, *names):
        fates = pa.array(decided.fates[first : first + batch.num_rows], pa.string())
        first += batch.num_rows
        given = {"reason": fates}
        arrays = [given.get(name, batch[name]) for name in names]
        yield pa.RecordBatch.from_arrays(arrays, schema=columns).filter(pc.is_in(fates, again))
    for shard in inputs.enhanced:
        for batch in batches(shard, *names):
            yield batch.filter(pc.is_in(batch["question_id"], new))


def write_results(path: Path, results: Sequence[Path], decided: NextPool) -> Counter[str]:
    """Write the round's results with what becomes of each question; how many are in which zone."""
    import pyarrow as pa

    from hpc_rl.data.regroup import write_batches
    from hpc_rl.grading.results import ROWS, ZONES, schema

    zones = Counter({f"zone_{zone}": 0 for zone in ZONES})
    columns = schema()
    whole = columns.append(pa.field("fate", pa.string())).append(pa.field("enhanced_to", pa.string()))

    def rows() -> Iterator[Any]:
        for shard in results:
            for batch in batches(shard, *(field.name for field in columns)):
                fates = [decided.fates[place] for place in batch["place"].to_pylist()]
                to = [decided.enhanced_to.get(id) for id in batch["question_id"].to_pylist()]
                zones.update(f"zone_{zone}" for zone in batch["zone"].to_pylist())
                added = [pa.array(fates, pa.string()), pa.array(to, pa.string())]
                yield pa.RecordBatch.from_arrays([*batch.columns, *added], schema=whole)

    write_batches(path, whole, rows(), ROWS)
    return zones


def attempts_of(job: Job) -> dict[str, Any]:
    """How the round's attempts came out (S18)."""
    names = ("samples", "right", "wrong", "left_out")
    graded = [shard.metrics for shard in job.inputs(job.round, "grade")]
    counts = {name: sum(metrics[name] for metrics in graded) for name in names}
    judged = [metrics["right"] + metrics["wrong"] for metrics in graded]
    rewards = sum(number * metrics["mean_reward"] for number, metrics in zip(judged, graded, strict=True))
    return {"attempts": counts, "mean_reward": round(rewards / sum(judged), 6) if sum(judged) else None}


def files_of(job: Job) -> dict[str, Path]:
    """Where everything of the round lies, by what it is (S16); folders where it is one file per shard."""
    folder = job.ws.dataset_dir(job.round)
    return {
        "questions": folder / "questions.parquet",
        "trajectories": job.ws.stage_dir(job.round, "collect"),
        "rewards": job.ws.stage_dir(job.round, "grade"),
        "enhanced_questions": job.ws.stage_dir(job.round, "enhance"),
        "solver_training": folder / "train.parquet",
        "solver_validation": folder / "validation.parquet",
        "generator_training": folder / "generator.parquet",
        "results": folder / "results.parquet",
        "next_questions": job.ws.dataset_dir(job.round + 1) / "questions.parquet",
    }


def say_empty(round: int, rounds: int, decided: NextPool) -> None:
    """A pool without a question is the end of the run; before its last round it is an error."""
    what = (
        f"round {round} leaves no question for round {round + 1}: none failed, none of {len(decided.fates)} was drawn "
        f"again, and of the variants that a teacher wrote {decided.duplicates_dropped} were asked before, "
        f"{decided.held_out_dropped} are held out"
    )
    if round < rounds:
        raise ValueError(
            f"{what}. End the run here with run.rounds={round}, or begin one with more pool.replay_fraction"
        )
    log.warning(what)


if __name__ == "__main__":
    sys.exit(main())
