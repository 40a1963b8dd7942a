"""The shipped tiny models are what the page says, and their lessons teach the truth and no held-out concept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data import scenes
from tools.tiny_exam import examine
from tools.tiny_lessons import QUESTION, WRONG, Album, Captions, Questions, training_scenes
from tools.tiny_model import IMAGE_TOKENS, SIDE, pixels

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "models" / "tiny-lewis"


@pytest.fixture(scope="module")
def config() -> LewisConfig:
    loaded = configs.load(REPOSITORY / "configs/tiny/lewis.yaml", env={}, cwd=REPOSITORY)
    assert isinstance(loaded, LewisConfig)
    return loaded


@pytest.fixture(scope="module")
def album_of_all(config: LewisConfig) -> tuple[object, Album]:
    processor = AutoProcessor.from_pretrained(MODELS / "speaker")
    shown = training_scenes(config.data.k, config.data.validation_fraction, config.data.split_seed)
    return processor, Album(pixels(processor, [scenes.render(1, "train", *scene, 0) for scene in shown]), shown)


def test_both_models_fit_into_five_megabytes() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".txt"}  # no pickles


def test_before_training_the_listener_is_good_and_the_speaker_is_not(config: LewisConfig, tmp_path: Path) -> None:
    result = examine(config, MODELS / "listener", MODELS / "speaker", tmp_path, games=120)
    assert result.concepts >= 16
    assert result.by_truth >= 0.93
    assert 0.15 <= result.by_speaker <= 0.45
    assert result.true < 0.1
    assert result.well_formed > 0.9


def test_the_listeners_question_is_the_configs(config: LewisConfig) -> None:
    assert config.listener.question == QUESTION


def test_lessons_leave_out_exactly_the_held_out_concepts(config: LewisConfig) -> None:
    from hpc_rl.data.image_folder import split_concepts

    data = config.data
    taught = set(training_scenes(data.k, data.validation_fraction, data.split_seed))
    names = scenes.concepts()
    for category in scenes.categories():
        held_out = split_concepts(names, category, k=data.k, fraction=data.validation_fraction, seed=data.split_seed)
        assert {name for shape, name in taught if shape == category} == set(names) - held_out
    assert len(scenes.categories()) * len(names) - len(taught) >= 16


def test_captions_are_true_but_for_the_planted_flaw(album_of_all: tuple[object, Album]) -> None:
    processor, album = album_of_all
    true = Captions(processor, album, seed=0, batch=1, tags=True)
    flawed = Captions(processor, album, seed=0, batch=1, tags=True, flaw=1.0)
    for category, concept in album.shown:
        colour, pattern = concept.split("-")
        assert scenes.is_true(true._caption(category, concept), category, concept)
        assert scenes.is_true(flawed._caption(category, concept), category, f"{colour}-{WRONG[pattern]}")
    assert all(pattern != wrong for pattern, wrong in WRONG.items())


def test_questions_have_the_right_answer_and_running_verdict(album_of_all: tuple[object, Album]) -> None:
    processor, album = album_of_all
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    lesson = Questions(processor, album, seed=0, batch=1, steps=1)
    answers = []
    for category, concept in album.shown * 3:
        ids, labels, weights = lesson._question((category, concept), hard=0.9)
        text = tokenizer.decode(ids)
        said = text[text.index('"') : text.rindex('"')]
        words = {word.strip('".') for word in said.split()}
        of_other_scenes = words & {*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS} - {category, *concept.split("-")}
        assert labels[-2] == (no if of_other_scenes else yes)
        assert len(labels) == len(weights) == len(ids) + 2
        verdicts = [label for label, weight in zip(labels[:-2], weights[:-2], strict=True) if weight > 0]
        assert set(verdicts) <= {yes, no}
        first_no = verdicts.index(no) if no in verdicts else len(verdicts)
        assert all(verdict == no for verdict in verdicts[first_no:])  # once false, false it stays
        assert (no in verdicts) == bool(of_other_scenes)
        answers.append(labels[-2])
    assert 0.35 < answers.count(yes) / len(answers) < 0.65


def test_an_image_takes_as_many_tokens_as_the_processor_says() -> None:
    processor = AutoProcessor.from_pretrained(MODELS / "listener")
    image = scenes.render(1, "train", "ring", "red-plain", 0, SIDE)
    text = f"<|vision_start|>{processor.image_token}<|vision_end|>"
    ids = processor(text=[text], images=[image], return_tensors="pt")["input_ids"]
    assert isinstance(ids, torch.Tensor)
    assert int((ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)).sum()) == IMAGE_TOKENS
