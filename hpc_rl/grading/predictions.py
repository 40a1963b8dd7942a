"""The prediction log (L22): one JSON line per graded completion, for people and notebooks; nothing in a run reads it.

Each shard's lines are an output of the shard. Where the config names a `logging.prediction_log`, they are added to that
file too, once the shard is committed, so that what a killed or overtaken worker did is not in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_rl.data.lewis import GameRow
from hpc_rl.grading.game import Verdict
from hpc_rl.services.client import ScoreError


def prediction(
    when: str, step: int, id: str, row: GameRow, text: str, verdict: Verdict, total: float
) -> dict[str, Any]:
    """One line of the prediction log (L22): time stamp, step, prompt, description, scores and reward."""
    said, score = verdict.description, verdict.score
    return {
        "time": when,
        "step": step,
        "id": id,
        "image": row.image,
        "candidates": list(row.ret_paths),
        "prompt": row.speaker_problem,
        "completion": text,
        "description": None if said is None else {"coarse": said.coarse, "detailed": said.detailed},
        "yes_probabilities": [None if math.isnan(p) else p for p in verdict.yes_probabilities],
        "predicted_index": verdict.predicted_index,
        "label": row.label,
        "reward": None if verdict.left_out else total,
        "rewards": {
            "accuracy": None if verdict.left_out else verdict.reward.accuracy,
            "format": verdict.reward.format,
            "length": verdict.reward.length,
        },
        "error": score.message if isinstance(score, ScoreError) else None,
    }


def write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a shard's lines."""
    with path.open("w") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def append(log: Path, shard_lines: Path) -> None:
    """Add a committed shard's lines to the run's log, all in one write so that other tasks' lines stay whole."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        file.write(shard_lines.read_bytes())
