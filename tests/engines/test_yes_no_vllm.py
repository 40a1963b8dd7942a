"""The listener in vLLM, run once in a process of its own: it answers what the listener in transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.engines.yes_no import YesNoModel
from tools.tiny_model import build, save

from .asked import CORPUS, PIXELS, QUESTIONS, pictures

pytest.importorskip("vllm", reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "listener"
    save(*build(CORPUS, seed=3), made)
    return made


@pytest.fixture(scope="module")
def said(run_with_vllm: Callable[..., None], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `judge_with_vllm.py` got, by the name of the case."""
    out = tmp_path_factory.mktemp("vllm") / "answers.json"
    run_with_vllm(Path(__file__).with_name("judge_with_vllm.py"), folder, out)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def other(folder: Path) -> YesNoModel:
    return YesNoModel(str(folder), **PIXELS)


@pytest.fixture(scope="module")
def expected(other: YesNoModel) -> list[Any]:
    """P(yes) of all pictures and questions in transformers, picture by picture."""
    images = other.encode([other.prepare(picture) for picture in pictures()])
    return other.yes_probabilities([(image, question) for image in images for question in QUESTIONS])


def test_both_engines_give_the_same_probabilities(said: Any, expected: list[Any], other: YesNoModel) -> None:
    assert said["all"] == pytest.approx(expected, abs=1e-4)
    assert said["tokens"] == [image.tokens for image in other.encode([other.prepare(p) for p in pictures()])]
    assert said["tokens made"] == other.tokens_made


def test_a_second_question_finds_the_image_read_already(said: Any, expected: list[Any], other: YesNoModel) -> None:
    large = other.encode([other.prepare(pictures()[3])])[0]
    assert said["again"] == [
        pytest.approx(other.yes_probabilities([(large, "red or blue?")])[0], abs=1e-4),
        pytest.approx(expected[0], abs=1e-4),
    ]
    assert said["cached"][0] >= 0.7 * large.tokens  # whole blocks of 128 tokens


def test_what_cannot_be_asked_has_a_reason_and_costs_the_others_nothing(said: Any) -> None:
    first, control, long, last = said["refused"]
    assert first == pytest.approx(last, abs=1e-6) and 0 < first < 1
    assert control == "the question holds the control token <|image_pad|>"
    assert "the model takes 1023" in long


def test_a_service_runs_it_in_another_thread_than_it_was_loaded_in(said: Any, expected: list[Any]) -> None:
    served = said["over http"]
    by_question = [result["yes_probabilities"] for result in served["results"]]
    assert [p for row in zip(*by_question, strict=True) for p in row] == pytest.approx(expected, abs=1e-4)
    assert served["tokens"] == said["tokens made"]


def test_weights_that_are_no_numbers_give_a_probability_that_is_none(said: Any) -> None:
    assert said["nan"] == ["nan"]


def test_vllm_runs_one_batch_at_a_time_and_the_config_says_so() -> None:
    with pytest.raises(ValidationError, match="2, but engine vllm runs one batch at a time"):
        ListenerServiceConfig(engine="vllm", inference_concurrency=2)
    assert ListenerServiceConfig(engine="transformers", inference_concurrency=2).inference_concurrency == 2
