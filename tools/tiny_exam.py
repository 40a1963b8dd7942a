"""How well the tiny models play before any training, by the game's own data code, engine, listener and parser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.config.lewis import EvalRowsConfig, LewisConfig
from hpc_rl.data import scenes
from hpc_rl.data.embedding import Embedder
from hpc_rl.data.images import load_image
from hpc_rl.data.lewis import GameRow
from hpc_rl.data.preparation import prepare_category
from hpc_rl.engines.base import Prompt, Request, Sampling, generate
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.grading.lewis import Description, decide, format_reward, parse, question


@dataclass(frozen=True)
class Result:
    """Shares of the games on held-out concepts; chance is 1/K.

    Attributes
    ----------
    games, concepts : int
        How many games, of how many held-out concepts.
    by_truth : float
        Targets that the listener finds by a true description.
    by_speaker : float
        Targets that it finds by the speaker's own greedy description.
    true, well_formed : float
        Descriptions by the speaker that are true; that keep to the format.
    """

    games: int
    concepts: int
    by_truth: float
    by_speaker: float
    true: float
    well_formed: float


def examine(config: LewisConfig, listener: Path, speaker: Path, scratch: Path, games: int) -> Result:
    """Play the untrained game on held-out concepts, with images rendered into `scratch`."""
    rows = held_out_games(config, speaker, scratch, games)
    low, high = config.speaker.min_pixels, config.speaker.max_pixels
    engine = TransformersEngine(str(speaker), min_pixels=low, max_pixels=high)
    requests = [Request(Prompt.of(row.speaker_problem, scratch / row.image), seed=0) for row in rows]
    said = [made.text for made in generate(engine, requests, Sampling(0.0, config.sample.max_tokens))]
    truth = [Description(*scenes.caption(row.category, row.concept)) for row in rows]
    judge = YesNoModel(str(listener), min_pixels=low, max_pixels=high)
    template = config.listener.question
    return Result(
        games=len(rows),
        concepts=len({(row.category, row.concept) for row in rows}),
        by_truth=_found(judge, template, scratch, rows, truth),
        by_speaker=_found(judge, template, scratch, rows, [parse(text) for text in said]),
        true=_mean([scenes.is_true(text, row.category, row.concept) for text, row in zip(said, rows, strict=True)]),
        well_formed=_mean([format_reward(text) for text in said]),
    )


def held_out_games(config: LewisConfig, speaker: Path, root: Path, games: int) -> list[GameRow]:
    """Validation games on pictures in `root`, made as the `prepare` stage makes them."""
    update = {"categories": tuple(scenes.categories()), "eval_rows": EvalRowsConfig(new_views=1, validation=games)}
    data = config.data.model_copy(update=update)
    embedder = Embedder(str(speaker), min_pixels=config.speaker.min_pixels, max_pixels=config.speaker.max_pixels)
    prepared = [prepare_category(data, root, index, embedder) for index in range(len(scenes.categories()))]
    return [row for category in prepared for row in category.games["validation"]]


def _found(
    judge: YesNoModel, template: str, root: Path, rows: Sequence[GameRow], told: Sequence[Description | None]
) -> float:
    right = []
    for row, description in zip(rows, told, strict=True):
        if description is None:
            right.append(False)
            continue
        images = judge.encode([judge.prepare(load_image(root / path)) for path in row.ret_paths])
        asked = question(template, description)
        right.append(decide(judge.yes_probabilities([(image, asked) for image in images])) == row.label)
    return _mean(right)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
