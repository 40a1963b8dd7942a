"""The listener's model in transformers: P(yes) of one plain forward pass, whatever shares its batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpc_rl.engines.yes_no import EncodedImage, YesNoModel, passes
from hpc_rl.engines.yes_no_prompts import Unscorable
from tools.tiny_model import build, save

from .asked import CORPUS, PIXELS, QUESTIONS, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "listener"
    save(*build(CORPUS, seed=3), made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> YesNoModel:
    return YesNoModel(str(folder), **PIXELS)


@pytest.fixture(scope="module")
def images(model: YesNoModel) -> list[EncodedImage]:
    return model.encode([model.prepare(picture) for picture in pictures()])


def plain(model: YesNoModel, picture: Image.Image, question: str) -> float:
    """P(yes) of the processor's own prompt: pixels in, a softmax over the whole vocabulary."""
    processor, network = model._processor, model._model
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with torch.no_grad():
        p = network(**processor(text=[prompt], images=[picture], return_tensors="pt")).logits[0, -1].double().softmax(0)
    spelt = {token: processor.tokenizer.decode([token]).strip().lower() for token in range(len(processor.tokenizer))}
    yes, no = (sum(float(p[token]) for token, text in spelt.items() if text == word) for word in ("yes", "no"))
    return yes / (yes + no)


def test_prompts_have_the_variables_of_the_chat_template(folder: Path) -> None:
    model = YesNoModel(str(folder), variables={"enable_thinking": False}, **PIXELS)
    (row,) = model.prompts.rows([(1, QUESTIONS[0])])
    assert isinstance(row, list) and model._processor.tokenizer.decode(row).endswith("assistant\n<think></think>")


def test_small_and_long_and_large_images_share_a_batch_with_short_and_long_questions(
    model: YesNoModel, images: list[EncodedImage]
) -> None:
    pairs = [(place, question) for place in range(len(images)) for question in QUESTIONS]
    together = model.yes_probabilities([(images[place], question) for place, question in pairs])
    assert together == pytest.approx([plain(model, pictures()[place], asked) for place, asked in pairs], abs=1e-5)
    assert len({round(p, 7) for p in together if isinstance(p, float)}) == len(pairs)  # they see image and question
    assert max(image.tokens for image in images) <= PIXELS["max_pixels"] // 28**2 < 3000 * 2000 // 28**2


def test_images_are_encoded_in_bounded_passes_as_in_one(
    folder: Path, images: list[EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = YesNoModel(str(folder), max_pass_tokens=20, **PIXELS)
    passed, encode = [], small._model.get_image_features

    def count(values: torch.Tensor, grids: torch.Tensor) -> Any:
        passed.append([int(grid.prod()) // 4 for grid in grids])
        return encode(values, grids)

    monkeypatch.setattr(small._model, "get_image_features", count)
    alone = small.encode([small.prepare(picture) for picture in pictures()])
    assert len(passed) > 1 and all(sum(tokens) <= 20 or len(tokens) == 1 for tokens in passed)
    for one, together in zip(alone, images, strict=True):
        assert one.tokens == together.tokens and one.grid.equal(together.grid)
        assert torch.allclose(one.data, together.data, atol=1e-5)


def test_many_small_passes_answer_what_one_large_pass_does(
    folder: Path, model: YesNoModel, images: list[EncodedImage]
) -> None:
    pairs = [(image, question) for image in images for question in QUESTIONS]
    small = YesNoModel(str(folder), max_pass_tokens=150, **PIXELS)
    assert small.yes_probabilities(pairs) == pytest.approx(model.yes_probabilities(pairs), abs=1e-5)


def test_passes_take_every_prompt_once_with_little_padding_and_within_the_limit() -> None:
    lengths = [70, 2000, 64, 71, 900, 130, 70, 1100, 66]
    found = passes(lengths, 400)
    assert sorted(index for chosen in found for index in chosen) == list(range(len(lengths)))
    for chosen in found:
        sizes = [lengths[index] for index in chosen]
        assert len(chosen) == 1 or (max(sizes) * len(sizes) <= 400 and max(sizes) <= 2 * min(sizes))
    assert passes([], 400) == [] and len(passes([70] * 600, 1 << 20)) == 1


def test_what_cannot_be_asked_has_a_reason_and_costs_the_others_nothing(
    folder: Path, images: list[EncodedImage]
) -> None:
    short = YesNoModel(str(folder), max_model_len=100, **PIXELS)
    fine, control, long = "red?", "red <|image_pad|>?", "red " * 200
    first, second, third, fourth = short.yes_probabilities([(images[0], text) for text in (fine, control, long, fine)])
    assert isinstance(first, float) and first == pytest.approx(fourth, abs=1e-6)
    assert second == Unscorable("the question holds the control token <|image_pad|>")
    assert isinstance(third, Unscorable) and "the model takes 100" in third.reason


def test_tokens_are_counted_without_padding_and_without_what_was_refused(
    folder: Path, images: list[EncodedImage]
) -> None:
    model = YesNoModel(str(folder), **PIXELS)
    tokenizer = model._processor.tokenizer
    model.yes_probabilities([(images[0], "red?"), (images[1], "red? blue?" * 5), (images[0], "<|image_pad|>")])
    template = len(
        tokenizer("<|im_start|>user\n<|vision_start|><|vision_end|><|im_end|>\n<|im_start|>assistant\n").input_ids
    )
    words = len(tokenizer("red?").input_ids) + len(tokenizer("red? blue?" * 5).input_ids)
    assert model.tokens_made == 2 * template + words + images[0].tokens + images[1].tokens


def test_weights_that_are_no_numbers_give_a_probability_that_is_none(folder: Path, images: list[EncodedImage]) -> None:
    model = YesNoModel(str(folder), **PIXELS)
    with torch.no_grad():
        model._model.get_output_embeddings().weight.fill_(math.nan)
    (p,) = model.yes_probabilities([(images[0], "red?")])
    assert isinstance(p, float) and math.isnan(p)
