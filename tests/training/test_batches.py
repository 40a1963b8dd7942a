"""Pictures and tokens of a batch: several pictures, large pictures, what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_rl.engines.base import Prompt, render
from hpc_rl.engines.loading import load_processor
from hpc_rl.training import collate
from hpc_rl.training.base import Tensors
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.pixels import Pictures
from hpc_rl.training.plan import Item
from hpc_rl.training.rollouts import Rollout

LIMITS = (3136, 56 * 56)


@pytest.fixture(scope="module")
def processor(speaker: Path) -> Any:
    return load_processor(speaker, *LIMITS)


def rollout(processor: Any, row: str, images: list[Image.Image], tokens: list[int]) -> Rollout:
    prompt = Prompt.of("Describe", *images)
    ids = processor(text=[render(processor, prompt)], images=images, return_tensors="np")["input_ids"][0]
    return Rollout(
        f"r01-{row}-g0", row, 0, "speaker", 0, ids.astype(np.int32), np.array(tokens, np.int32),
        np.linspace(-1, -2, len(tokens), dtype=np.float32), True, {}, 1.0,
    )  # fmt: skip


def batches(processor: Any, images: dict[str, list[Image.Image]], cache_bytes: int = 1 << 20) -> Batches:
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    pixels = Pixels(processor.image_processor, lambda row: images[row], cache_bytes)
    ids = {"pad_id": tokenizer.pad_token_id, "image_id": image_id, "vision_ids": frozenset({image_id})}
    return Batches((), Shape(1, 1, 2), 0, pixels, **ids)


def test_several_and_large_pictures_line_up_with_their_tokens(processor: Any, speaker: Path) -> None:
    from transformers import AutoModelForImageTextToText

    colours = ("red", "green", "blue")
    images = {
        "two": [Image.new("RGB", (56, 56), c) for c in colours[:2]],
        "large": [Image.new("RGB", (1600, 900), "blue")],
    }
    items = [
        Item(rollout(processor, "two", images["two"], [95, 96, 97]), 0.5),
        Item(rollout(processor, "large", images["large"], [98, 99]), -0.5),
    ]
    made = batches(processor, images).tensors(items, step_tokens=5)
    assert made["num_images"] == [2, 1] and made["image_grid_thw"].shape == (3, 3)
    assert made["image_grid_thw"][2].prod() * 14 * 14 <= LIMITS[1], "scaled down to max_pixels"
    assert made["mm_token_type_ids"].sum() == made["image_grid_thw"].prod(-1).sum() // 4
    assert made["completion_ids"].tolist()[1][:2] == [98, 99]
    assert made["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert made["old_per_token_logps"][1].tolist() == [-1.0, -2.0, 0.0] and made["num_items_in_batch"] == 5
    assert made["prompt_mask"].sum(-1).tolist() == [len(i.rollout.prompt_ids) for i in items]
    model = AutoModelForImageTextToText.from_pretrained(speaker)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    logits = model(input_ids=ids, attention_mask=mask, **{name: made[name] for name in names}).logits
    assert torch.isfinite(logits).all()


def test_a_filler_has_no_part_in_the_loss(processor: Any) -> None:
    images = {"a": [Image.new("RGB", (56, 56), "red")]}
    real = Item(rollout(processor, "a", images["a"], [95, 96]), 1.0)
    filler = Item(real.rollout, 0.0, 0)
    made = batches(processor, images).tensors([real, filler], step_tokens=2)
    assert made["completion_mask"].tolist() == [[1, 1], [0, 0]] and made["num_items_in_batch"] == 2
    assert made["old_per_token_logps"][1].tolist() == [0, 0] and made["advantages"].tolist() == [1, 0]


def test_a_vision_token_in_a_completion_is_named(processor: Any) -> None:
    images = {"a": [Image.new("RGB", (56, 56), "red")]}
    pad = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    item = Item(rollout(processor, "a", images["a"], [95, pad]), 1.0)
    with pytest.raises(UnusableData, match=r"r01-a-g0 holds a vision token, which sampling must ban"):
        batches(processor, images).tensors([item], step_tokens=2)


def test_pictures_are_loaded_again_when_there_is_no_room_for_them(processor: Any) -> None:
    loads = []
    pixels = Pixels(processor.image_processor, lambda row: [loads.append(row) or Image.new("RGB", (56, 56), row)], 1)
    for row in ("red", "red", "blue", "blue", "red"):
        pixels(row)
    assert loads == ["red", "blue", "red"]
