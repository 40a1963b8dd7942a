"""Job body of the evaluate stage: the game on images and concepts that training never saw (L21)."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.orchestrate import curves, evaluation
from hpc_rl.orchestrate.blocked import blocked
from hpc_rl.orchestrate.evaluation import Asked
from hpc_rl.orchestrate.job import Job, Shard, open_job
from hpc_rl.run.seeds import derive

log = logging.getLogger("hpc_rl")

SETS = ("new_views", "validation")


@blocked
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jobs.lewis.evaluate --workspace W --round R`; 75 when no listener answers, or to start anew."""
    job = open_job("evaluate", argv)
    from hpc_rl.engines.gpus import check_gpus

    check_gpus(job.config, job.stage.name)
    for shard in job.shards():
        evaluate(job, shard)
    return 0


@dataclass(frozen=True)
class Played:
    """One game as it was played."""

    set: str
    row: Any
    text: str
    verdict: Any

    @property
    def correct(self) -> bool:
        """The listener picked the target."""
        return bool(self.verdict.predicted_index == self.row.label)


def evaluate(job: Job, shard: Shard) -> None:
    """Describe, ask, count; write the files, commit, and tell TensorBoard."""
    from hpc_rl.data.lewis import image_root, read_rows
    from hpc_rl.engines.weights import Role, weights_of
    from hpc_rl.grading import predictions
    from hpc_rl.services.client import ListenerClient

    config = job.config
    assert isinstance(config, LewisConfig)
    wandb = curves.find_wandb(config)
    (dataset,) = job.inputs(0, "dataset")
    rows = [(name, row) for name in SETS for row in read_rows(dataset.path(f"{name}.parquet"))]
    weights = weights_of(job.ws, Role("speaker", config.speaker), job.round)
    root = image_root(job.ws, config.data.image_root)
    fit = fitting(config, rows, root, weights.base)
    dropped = Counter(name for name, row in rows if (name, row.id) not in fit)
    rows = [(name, row) for name, row in rows if (name, row.id) in fit]
    engine = evaluation.open_engine(job, config.speaker, weights)
    played: list[Played] = []
    started = time.monotonic()
    with ListenerClient(job.ws, config) as listener:
        for start in range(0, len(rows), config.evaluate.batch_size):
            played += play(job, config, rows[start : start + config.evaluate.batch_size], root, engine, listener)
            shard.progress(len(played), len(rows))
    dropped_of_sets = {f"dropped_{name}": float(dropped[name]) for name in SETS}
    metrics = {**summary(config, played), **dropped_of_sets, "playing_s": round(time.monotonic() - started, 2)}
    table, log_lines = shard.output("evaluation.parquet"), shard.output("predictions.jsonl")
    write_table(table, played)
    write_predictions(log_lines, job, config, played)
    made_from = {"weights": weights.hash, "engine": engine.kind, "temperature": config.evaluate.temperature}
    points = {f"evaluate/{name}": value for name, value in metrics.items()}
    curves.write(job, points | curves.of_sampling(job, config.sampling_stage))
    if config.logging.tensorboard:
        show_games(job, config, played, root)
    if shard.commit([table, log_lines], made_from=made_from, metrics=metrics):
        log.info("round %d: %s", job.round, metrics)
        if config.logging.prediction_log is not None:
            predictions.append(config.logging.prediction_log, log_lines)
        curves.write_wandb(wandb, job, points)


def fitting(config: LewisConfig, rows: Sequence[tuple[str, Any]], root: Path, model: str) -> set[tuple[str, str]]:
    """Set and id of the games whose prompt leaves room for a description; see `evaluation.check_prompts`."""
    from hpc_rl.engines.base import Prompt

    prompts = ((f"{name}/{row.id}", Prompt.of(row.speaker_problem, root / row.image)) for name, row in rows)
    checked = evaluation.check_prompts(config, config.speaker, model, prompts)
    return {(name, row.id) for name, row in rows if f"{name}/{row.id}" not in checked.dropped}


def play(
    job: Job, config: LewisConfig, rows: Sequence[tuple[str, Any]], root: Path, engine: Any, listener: Any
) -> list[Played]:
    """Play some games.

    Raises
    ------
    ValueError
        For a game whose image cannot be read, with its set and row.
    """
    from hpc_rl.engines.base import Prompt
    from hpc_rl.grading.game import judge

    asked = [
        Asked(
            f"{name}/{row.id}, image {row.image}",
            Prompt.of(row.speaker_problem, root / row.image),
            derive(config.run.seed, job.round, "evaluate", row.id),
        )
        for name, row in rows
    ]
    texts = [made.text for made in evaluation.complete(engine, asked, evaluation.sampling_of(config))]
    verdicts = judge(texts, [row for _, row in rows], listener, config.listener.question, config.rewards)
    return [Played(name, row, text, verdict) for (name, row), text, verdict in zip(rows, texts, verdicts, strict=True)]


def summary(config: LewisConfig, played: Sequence[Played]) -> dict[str, float]:
    """The metrics: each by set; recognition without a set's name is that on held-out concepts."""
    metrics: dict[str, float] = {"chance": round(1 / config.data.k, 4)}
    for name in SETS:
        metrics |= summary_of_set(config, name, [game for game in played if game.set == name])
    for key in ("recognition_yes", "recognition_no", "recognition_overall"):
        if f"{key}_validation" in metrics:
            metrics[key] = metrics[f"{key}_validation"]
    metrics["format_rate"] = mean([game.verdict.reward.format for game in played])
    return metrics


def summary_of_set(config: LewisConfig, name: str, games: Sequence[Played]) -> dict[str, float]:
    """Metrics of one set. Games without a score are left out and counted."""
    from hpc_rl.grading.game import recognition

    scored = [game for game in games if not game.verdict.left_out]
    found = recognition([game.verdict for game in scored], [game.row for game in scored])
    metrics = {
        f"accuracy_{name}": mean([float(game.correct) for game in scored]),
        f"n_{name}": len(scored),
        f"left_out_{name}": len(games) - len(scored),
        f"format_rate_{name}": mean([game.verdict.reward.format for game in games]),
        f"one_sentence_{name}": mean([float(game.verdict.reward.length > 0) for game in games]),
        **{f"{key}_{name}": round(value, 4) for key, value in found.items()},
    }
    if config.data.scenes is not None:
        from hpc_rl.data.scenes import is_true

        metrics[f"true_{name}"] = mean([float(is_true(g.text, g.row.category, g.row.concept)) for g in games])
    return metrics


def mean(values: Sequence[float]) -> float:
    """Their mean, rounded; 0 of none."""
    return round(sum(values) / len(values), 4) if values else 0.0


def write_table(path: Path, played: Sequence[Played]) -> None:
    """One row per game."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "set": game.set,
            "row_id": game.row.id,
            "category": game.row.category,
            "concept": game.row.concept,
            "text": game.text,
            "label": game.row.label,
            "predicted_index": game.verdict.predicted_index,
            "correct": game.correct,
            "left_out": game.verdict.left_out,
            "format": game.verdict.reward.format,
            "length": game.verdict.reward.length,
            "yes_probabilities": list(game.verdict.yes_probabilities),
        }
        for game in played
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_predictions(path: Path, job: Job, config: LewisConfig, played: Sequence[Played]) -> None:
    """The prediction log (L22)."""
    from hpc_rl.grading import predictions
    from hpc_rl.grading.game import weights_of

    now, weights = datetime.now(UTC).isoformat(timespec="milliseconds"), weights_of(config.rewards)
    lines = (
        {"set": g.set, **predictions.prediction(now, job.round, g.row.id, g.row, g.text, g.verdict, total)}
        for g in played
        for total in [g.verdict.reward.total(weights)]
    )
    predictions.write(path, lines)


def show_games(job: Job, config: LewisConfig, played: Sequence[Played], root: Path) -> None:
    """The first games of each set in TensorBoard, with image, candidates and decision."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from hpc_rl.data.images import load_image

    with SummaryWriter(str(job.ws.tb_dir / "run"), filename_suffix=f".games-{job.round:02d}") as writer:
        for set_name in SETS:
            games = [game for game in played if game.set == set_name][: config.evaluate.sample_texts_to_log]
            for number, game in enumerate(games):
                tag = f"{set_name}/{number}"
                shown = [load_image(root / path) for path in (game.row.image, *game.row.ret_paths)]
                side = min(256, max(max(image.size) for image in shown))
                strip = np.concatenate([np.asarray(image.resize((side, side))) for image in shown], axis=1)
                writer.add_image(tag, strip, job.round, dataformats="HWC")
                said = f"`{game.text}`\n\ntarget {game.row.label}, picked {game.verdict.predicted_index}"
                chances = ", ".join(f"{p:.3f}" for p in game.verdict.yes_probabilities)
                writer.add_text(tag, f"{said}, P(yes) {chances or '-'}", job.round)


if __name__ == "__main__":
    sys.exit(main())
