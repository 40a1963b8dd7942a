"""Job body of round 0: the question file becomes the first pool; some questions are held out, some for validation."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpc_rl.config.errors import format_problems
from hpc_rl.config.prosetting import ProSettingConfig
from hpc_rl.data.question_files import BadRow, QuestionFile, QuestionFileError, iter_rows, look_through
from hpc_rl.data.questions import Question, Split, iter_texts, write_questions
from hpc_rl.orchestrate import curves
from hpc_rl.orchestrate.job import Shard, open_job
from hpc_rl.orchestrate.placing import commit_placed

log = logging.getLogger("hpc_rl")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.prosetting.questions --workspace W --round 0`"""
    job = open_job("pool", argv)
    assert isinstance(job.config, ProSettingConfig)
    for shard in job.shards():
        first_pool(job.config, shard)
    return 0


def first_pool(config: ProSettingConfig, shard: Shard) -> None:
    """Write the pool of round 1 and the held-out questions, in the order of their files."""
    from hpc_rl.data.diversity import diversity
    from hpc_rl.data.question_split import split_roots
    from hpc_rl.run import atomic
    from hpc_rl.run.manifest import sha256_of

    options, ws = config.questions, shard.job.ws
    before = {path: sha256_of(path) for path in (options.file, options.held_out_file) if path is not None}
    files, problems = look_through(options)
    if problems:
        raise QuestionFileError(format_problems(problems))
    for file in files:
        say_duplicates(file)
    ids = [f"q{number:06d}" for number, _ in files[0].keys.values()]
    fraction = options.held_out_fraction if len(files) == 1 else 0.0
    splits = split_roots(ids, held_out=fraction, validation=options.validation_fraction, seed=config.run.seed)
    if len(files) == 2:
        splits.update({f"h{number:06d}": "held_out" for number, _ in files[1].keys.values()})
    pool, held_out, about = (
        shard.output(name) for name in ("questions.parquet", "held_out.parquet", "dataset_info.json")
    )
    number = write_questions(pool, initial(files[0], "q", splits, ("train", "validation")))
    kept = write_questions(held_out, initial(files[-1], "q" if len(files) == 1 else "h", splits, ("held_out",)))
    for path, sha256 in before.items():
        if sha256_of(path) != sha256:
            raise QuestionFileError(f"{path} was changed while it was read; launch again when it is complete")
    measured = diversity(iter_texts(pool), config.run.seed)
    sizes = {split: sum(one == split for one in splits.values()) for split in ("train", "validation", "held_out")}
    assert (number, kept) == (sizes["train"] + sizes["validation"], sizes["held_out"]), "every question lies somewhere"
    metrics = {
        "questions": number,
        **sizes,
        "duplicates_dropped": sum(file.duplicates_number for file in files),
        "contradictions": sum(file.contradictions for file in files),
        "diversity": measured.distinct_2,
        "compression_ratio": measured.compression_ratio,
    }
    sources = [{"path": str(path), "sha256": sha256} for path, sha256 in before.items()]
    info = {
        "files": sources,
        "seed": config.run.seed,
        "held_out_fraction": fraction or None,
        "validation_fraction": options.validation_fraction,
        **metrics,
    }
    atomic.write_json(about, info)
    written = {
        pool: ws.dataset_dir(1) / "questions.parquet",
        held_out: ws.dataset_dir(0) / "held_out.parquet",
        about: ws.dataset_dir(0) / "dataset_info.json",
    }
    curves.write(shard.job, {f"pool/{name}": metrics[name] for name in ("questions", "diversity", "compression_ratio")})
    commit_placed(shard, written, made_from={"files": sources}, metrics=metrics)


def initial(
    file: QuestionFile, letter: str, splits: Mapping[str, Split], wanted: Sequence[Split]
) -> Iterator[Question]:
    """The questions of a file that are of these splits, each where it comes first, in order."""
    first = {number for number, _ in file.keys.values()}
    for row in iter_rows(file.path):
        id = f"{letter}{row.number:06d}"
        if isinstance(row, BadRow) or row.number not in first or splits[id] not in wanted:
            continue
        yield Question(
            id, row.question, row.answer, row.solution, root_id=id, parent_id=None, made_in=0, kind="",
            split=splits[id], reason="initial",
        )  # fmt: skip


def say_duplicates(file: QuestionFile) -> None:
    """Name the questions that are there twice, and those whose answers differ."""
    if not file.duplicates_number:
        return
    shown: list[Any] = [
        f"{one.place} = {one.earlier}" + ("" if one.same_answer else " (with another answer)")
        for one in file.duplicates
    ]
    more = f" and {file.duplicates_number - len(shown)} more" if file.duplicates_number > len(shown) else ""
    log.warning("%s: %d questions are there twice; the first counts: %s%s",
                file.path, file.duplicates_number, ", ".join(shown), more)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
