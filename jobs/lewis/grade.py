"""Job body of the grade stage: what each sample of a shard is worth, asked of the listener service."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.job import Job, Shard, open_job

log = logging.getLogger("hpc_rl")


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.lewis.grade --workspace W --round R`; 75 when no listener answers (what is graded stays)."""
    job = open_job("grade", argv)
    from hpc_rl.data.lewis import read_rows
    from hpc_rl.services.client import ListenerClient

    config = job.config
    assert isinstance(config, LewisConfig)
    (dataset,) = job.inputs(0, "dataset")
    rows = read_rows(dataset.path("train.parquet"))
    places = {id: place for place, id in enumerate(rows.ids)}
    with ListenerClient(job.ws, config) as listener:
        for shard in job.shards():
            sampled = job.input(job.round, "sample", shard.index).path("samples.parquet")
            grade(job, config, shard, sampled, lambda id: rows[places[id]], listener)
    return 0


def grade(
    job: Job, config: LewisConfig, shard: Shard, samples_path: Path, row_of: Callable[[str], Any], listener: Any
) -> None:
    """Grade the samples of a shard that were accepted, and commit it; the others are only counted."""
    from hpc_rl.grading import predictions
    from hpc_rl.grading.game import LewisGraded, judge, weights_of
    from hpc_rl.grading.samples import iter_samples, write_samples

    samples = []
    accepted: Counter[tuple[int, str]] = Counter()  # by group and role, also of those with none
    attempts = 0
    for sample in iter_samples(samples_path):
        attempts += 1
        accepted[sample.group, sample.role] += sample.accepted
        if sample.accepted:
            samples.append(sample)
    games = [row_of(sample.row_id) for sample in samples]
    shard.progress(0, len(samples))
    started = time.monotonic()
    verdicts = judge([s.text for s in samples], games, listener, config.listener.question, config.rewards)
    took_s = time.monotonic() - started
    weights = weights_of(config.rewards)
    graded = [
        LewisGraded(
            **vars(sample),
            reward_accuracy=None if verdict.left_out else verdict.reward.accuracy,
            reward_format=verdict.reward.format,
            reward_length=verdict.reward.length,
            reward=None if verdict.left_out else verdict.reward.total(weights),
            left_out=verdict.left_out,
            predicted_index=verdict.predicted_index,
            yes_probabilities=verdict.yes_probabilities,
        )
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]
    path, log_lines = shard.output("graded.parquet"), shard.output("predictions.jsonl")
    write_samples(path, graded, LewisGraded)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    predictions.write(
        log_lines,
        (
            predictions.prediction(now, job.round, s.sample_id, row, s.text, verdict, verdict.reward.total(weights))
            for s, row, verdict in zip(samples, games, verdicts, strict=True)
        ),
    )
    if config.logging.debug:
        write_debug_file(job, graded)
    for verdict in verdicts:
        if verdict.left_out:
            log.warning("left out: %s", getattr(verdict.score, "message", ""))
    made_from = {"samples": samples_path.name}
    metrics = {
        "attempts": attempts,
        **summary(graded, took_s),
        "groups": len(accepted),
        "short_groups": sum(number < config.sample.samples_per_prompt for number in accepted.values()),
    }
    if metrics["short_groups"]:
        log.warning(
            "%d of %d groups have fewer than %d accepted samples",
            metrics["short_groups"], len(accepted), config.sample.samples_per_prompt,
        )  # fmt: skip
    committed = shard.commit([path, log_lines], made_from=made_from, metrics=metrics)
    if committed and config.logging.prediction_log is not None:
        predictions.append(config.logging.prediction_log, log_lines)


def summary(graded: Sequence[Any], took_s: float) -> dict[str, float]:
    """Numbers for the manifest: counts, mean rewards by part, and groups that carry no gradient (L15)."""
    groups: dict[tuple[int, str], set[float]] = defaultdict(set)
    for sample in graded:
        if not sample.left_out:
            groups[sample.group, sample.role].add(round(sample.reward, 6))
    scored = [sample for sample in graded if not sample.left_out]
    means = {
        f"mean_{part}": round(sum(getattr(sample, part) for sample in scored) / len(scored), 6) if scored else 0.0
        for part in ("reward", "reward_accuracy", "reward_format", "reward_length")
    }
    return {
        "samples": len(graded),
        "left_out": len(graded) - len(scored),
        "not_a_description": sum(not s.left_out and not s.yes_probabilities for s in graded),
        "groups_without_gradient": sum(len(rewards) == 1 for rewards in groups.values()),
        **means,
        "grading_s": round(took_s, 2),
    }


def write_debug_file(job: Job, graded: Sequence[Any]) -> None:
    """Raw completions and rewards, one file per rank and job (L24; the seed's `debug_speaker_{rank}_{job_id}.txt`)."""
    folder = job.ws.log_dir(job.round, job.stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"debug_speaker_{job.rank}_{os.environ.get('HPC_RL_JOB_ID') or 'local'}.txt"
    with (folder / name).open("a") as file:
        for s in graded:
            file.write(
                f"---- {s.sample_id}\n{s.text}\n"
                f"accuracy {s.reward_accuracy} format {s.reward_format} length {s.reward_length} total {s.reward} "
                f"P(yes) {list(s.yes_probabilities)} picked {s.predicted_index} left out {s.left_out}\n"
            )


if __name__ == "__main__":
    sys.exit(main())
