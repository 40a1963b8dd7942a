"""The Lewis game as training sees it: the round's pictures, and the listener who judges descriptions (L12–L14)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.images import load_image
from hpc_rl.data.lewis import GameRow, image_root, read_rows, rows_of_round
from hpc_rl.grading.game import judge, weights_of
from hpc_rl.grading.predictions import prediction
from hpc_rl.orchestrate.job import Job
from hpc_rl.services.client import ListenerClient
from hpc_rl.training.algorithms.grpo_live import Asked, Game, Parts
from hpc_rl.training.run import TrainRun


def pictures(job: Job) -> Callable[[str], Sequence[Image.Image]]:
    """The pictures of a row by its id: see `hpc_rl.training.task.TrainTask.pictures`."""
    config = _config(job)
    rows = read_rows(job.input(0, "dataset", 0).path("train.parquet"))
    places = {id: place for place, id in enumerate(rows.ids)}
    root = image_root(job.ws, config.data.image_root)
    return lambda row_id: [load_image(root / rows[places[row_id]].image)]


@contextmanager
def play(run: TrainRun) -> Iterator[Game]:
    """The round's games: see `hpc_rl.training.task.TrainTask.live`."""
    job, config = run.job, _config(run.job)
    every = read_rows(job.input(0, "dataset", 0).path("train.parquet"))
    rows = rows_of_round(every, job.round, prompts_per_round=config.sample.prompts_per_round, seed=config.run.seed)
    root = image_root(job.ws, config.data.image_root)
    predictions = run.places.output("predictions.jsonl")
    with ExitStack() as stack:
        listener = stack.enter_context(ListenerClient(job.ws, config)) if run.world.is_main else None
        yield Game(
            ids=[row.id for row in rows],
            prompts=[row.speaker_problem for row in rows],
            judge=Judge(config, rows, listener, predictions, list(run.task.rewards)),
            picture=lambda row: load_image(root / rows[row].image),
            outputs=[predictions],
        )


class Judge:
    """Asks the listener, and writes its verdicts to the prediction log (L22); on rank 0.

    Parameters
    ----------
    rows
        The round's games.
    listener
        None on other ranks, where it is not called.
    predictions
        File for the prediction log.
    parts
        Names of the parts of the reward.
    """

    def __init__(
        self, config: LewisConfig, rows: Sequence[GameRow], listener: ListenerClient | None, predictions: Path,
        parts: Sequence[str],
    ) -> None:  # fmt: skip
        self._config, self._rows, self._listener = config, rows, listener
        self._predictions, self._parts = predictions, parts

    def __call__(self, asked: Sequence[Asked], step: int) -> list[Parts]:
        """Reward parts of these descriptions.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            See `ListenerClient.score`.
        """
        assert self._listener is not None
        texts, rows = [one.text for one in asked], [self._rows[one.row] for one in asked]
        config, weights = self._config, weights_of(self._config.rewards)
        verdicts = judge(texts, rows, self._listener, config.listener.question, config.rewards)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._predictions.open("a") as file:
            for text, row, verdict in zip(texts, rows, verdicts, strict=True):
                line = prediction(now, step, row.id, row, text, verdict, verdict.reward.total(weights))
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return [
            None if verdict.left_out else tuple(getattr(verdict.reward, part) for part in self._parts)
            for verdict in verdicts
        ]


def _config(job: Job) -> LewisConfig:
    assert isinstance(job.config, LewisConfig)
    return job.config
