"""Tensors of a forward pass: those of TRL's collators, pictures that fit their tokens, fillers without a part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hpc_rl.engines.base import Prompt, render
from hpc_rl.engines.loading import load_processor
from hpc_rl.training.base import Tensors
from hpc_rl.training.data import collate, plan
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.pairs import Pair
from hpc_rl.training.data.pixels import Pictures
from hpc_rl.training.data.plan import Item, Shape, Step
from hpc_rl.training.data.rollouts import Counts, Rollout, Rollouts
from hpc_rl.training.data.solutions import Question, Solution
from hpc_rl.training.data.texts import Pack, Text
from hpc_rl.training.data.units import INDEX, Units, alone
from hpc_rl.training.errors import UnusableData

LIMITS = (3136, 56 * 56)
PAD = 0


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def units_of(units: Sequence[Any], **columns: Any) -> Units[Any]:
    """Units in memory."""
    index = np.zeros(len(units), np.dtype([*INDEX, *((name, np.float32) for name in columns)]))
    index["row"], index["length"] = np.arange(len(units)), 1
    for name, values in columns.items():
        index[name] = values
    return Units(index, alone(len(units)), lambda places: [units[place["row"]] for place in places], "d")


def made(maker: Any, *units: Any, weight: int = 1, **columns: Any) -> Tensors:
    """What a maker makes of some units in one pass."""
    step: Step[Any] = Step(units_of(units, **columns), Shape(1, 1, len(units)), np.arange(len(units)))
    found: Tensors = maker(step, [Item(unit, place, weight) for place, unit in enumerate(units)])
    return found


def as_lists(tensors: Tensors) -> dict[str, Any]:
    return {name: value.tolist() if torch.is_tensor(value) else value for name, value in tensors.items()}


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


def maker(processor: Any, images: dict[str, list[Image.Image]]) -> collate.Rollouts:
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    pictures = Pictures(processor.image_processor, lambda row: images[row], image_id)
    return collate.Rollouts(tokenizer.pad_token_id, frozenset({image_id}), pictures)


def test_several_and_large_pictures_line_up_with_their_tokens(processor: Any, speaker: Path) -> None:
    from transformers import AutoModelForImageTextToText

    colours = ("red", "green", "blue")
    images = {
        "two": [Image.new("RGB", (56, 56), c) for c in colours[:2]],
        "large": [Image.new("RGB", (1600, 900), "blue")],
    }
    samples = [
        rollout(processor, "two", images["two"], [95, 96, 97]),
        rollout(processor, "large", images["large"], [98, 99]),
    ]
    found = made(maker(processor, images), *samples, tokens=[3, 2])
    assert found["num_images"] == [2, 1] and found["image_grid_thw"].shape == (3, 3)
    assert found["image_grid_thw"][2].prod() * 14 * 14 <= LIMITS[1], "scaled down to max_pixels"
    assert found["mm_token_type_ids"].sum() == found["image_grid_thw"].prod(-1).sum() // 4
    assert found["completion_ids"].tolist()[1][:2] == [98, 99]
    assert found["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert found["old_per_token_logps"][1].tolist() == [-1.0, -2.0, 0.0] and found["num_items_in_batch"] == 5
    assert found["prompt_mask"].sum(-1).tolist() == [len(one.prompt_ids) for one in samples]
    model = AutoModelForImageTextToText.from_pretrained(speaker)
    tokens = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
    mask = torch.cat([found["prompt_mask"], found["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    logits = model(input_ids=tokens, attention_mask=mask, **{name: found[name] for name in names}).logits
    assert torch.isfinite(logits).all()


def test_a_vision_token_in_a_completion_is_named(processor: Any) -> None:
    images = {"a": [Image.new("RGB", (56, 56), "red")]}
    pad = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    with pytest.raises(UnusableData, match=r"r01-a-g0 holds a vision token, which sampling must ban"):
        made(maker(processor, images), rollout(processor, "a", images["a"], [95, pad]), tokens=[2])


def test_a_row_without_pictures_among_such_with_pictures_is_named(processor: Any) -> None:
    images: dict[str, list[Image.Image]] = {"a": [Image.new("RGB", (56, 56), "red")], "b": []}
    samples = [rollout(processor, "a", images["a"], [95]), rollout(processor, "a", images["a"], [95])]
    samples[1] = replace(samples[1], id="r01-b-g0", row_id="b")
    with pytest.raises(UnusableData, match=r"row 'b', of which sample r01-b-g0 is, has no pictures"):
        made(maker(processor, images), *samples, tokens=[1, 1])


def test_pictures_are_loaded_again_when_there_is_no_room_for_them(processor: Any) -> None:
    loads = []

    def load(row: str) -> list[Image.Image]:
        loads.append(row)
        return [Image.new("RGB", (56, 56), row)]

    pictures = Pictures(processor.image_processor, load, 0, cache_bytes=1)
    for row in ("red", "red", "blue", "blue", "red"):
        pictures.of(row)
    assert loads == ["red", "blue", "red"]


def test_a_pass_without_units_has_one_filler_that_no_loss_is_counted_over() -> None:
    samples = [Rollout("a", "", 0, "", 0, ids(5), ids(6, 7), np.float32([-1, -2]), True, {}, 1.0)]
    found = made(collate.Rollouts(PAD), *samples, weight=0, tokens=[2])
    assert found["completion_mask"].tolist() == [[0, 0]] and found["old_per_token_logps"].tolist() == [[0, 0]]
    texts = [Text("a", ids(5), ids(6, 7))]
    assert made(collate.Texts(PAD), *texts, weight=0)["labels"].tolist() == [[-100] * 3]
    assert made(collate.Packs(), Pack(tuple(texts)), weight=0)["labels"].tolist() == [[-100] * 3]
    batches = [
        Batches(plan.in_order(units_of(texts), Shape(ranks=3, accumulation=2, batch=2)), rank, collate.Texts(PAD))
        for rank in range(3)
    ]
    passes = [batch for rank in batches for batch in rank.loader()]
    assert [batch["share"] for batch in passes].count(0) == 5 and sum(batch["share"] for batch in passes) == 6
    assert all(batch["units"] == ["a"] for batch in passes)
    assert sum(int((batch["labels"] >= 0).sum()) for batch in passes) == 2, "the text has its part once"


def test_advantages_are_those_of_the_group_or_scaled_by_the_whole_step() -> None:
    rewards = [1.0, 0.0, 3.0, 2.0]
    index = units_of(rewards, reward=rewards).index
    counts = Counts(4, 0, 2, 0, 0, 0)
    rollouts = Rollouts(
        index, np.array([0, 2, 4]), lambda places: [rewards[p["row"]] for p in places], "d", roles=("s",), parts=(),
        counts=counts, weights_hash="w",
    )  # fmt: skip
    (step,) = plan.make(rollouts, Shape(1, 1, 4), epochs=1, run_seed=0, round=1)
    own = step.batch(0, 0)[1:3]
    for scale, divisor in (("none", 1.0), ("batch", np.std(rewards, ddof=1) + 1e-4), ("group", np.sqrt(0.5) + 1e-4)):
        found = collate.Advantages(rollouts, scale)(step, own)["advantages"]  # type: ignore[arg-type]
        expected = [(0.5 if rewards[item.place] in (1, 3) else -0.5) / divisor for item in own]
        assert found.tolist() == pytest.approx(expected)
    assert not collate.Advantages(rollouts, "group")(step, [Item(1.0, 0, 0)])["advantages"].any()
    numbers = np.array([0.5, 1.5, 2.5, 3.5])
    assert collate.ByPlace(ref=numbers)(step, own)["ref"].tolist() == [numbers[item.place] for item in own]


TEXTS = [Text("a", ids(5, 6, 7), ids(8, 9), 2.0), Text("b", ids(5), ids(6), 0.5), Text("c", ids(4, 4), ids(3, 2, 1))]


def test_texts_are_batched_as_trl_does() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from hpc_rl.training import trl_parts  # noqa: F401  (TRL without vLLM)

    examples = [
        {
            "input_ids": [*text.prompt_ids.tolist(), *text.completion_ids.tolist()],
            "labels": [-100] * len(text.prompt_ids) + text.completion_ids.tolist(),
        }
        for text in TEXTS
    ]
    ours, packed = (
        made(collate.Texts(PAD), *TEXTS),
        made(collate.Packs(), Pack((TEXTS[0], TEXTS[1])), Pack((TEXTS[2],))),
    )
    assert as_lists(ours) == as_lists(DataCollatorForLanguageModeling(pad_token_id=PAD)(examples))
    assert as_lists(packed) == as_lists(DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(examples))


def test_each_label_has_the_weight_of_its_text() -> None:
    batch = made(collate.Texts(PAD, weighted=True), *TEXTS)
    packed = made(collate.Packs(weighted=True), Pack(tuple(TEXTS)))
    for found in (batch, packed):
        learned = found["labels"] >= 0
        assert found["weights"].shape == found["labels"].shape
        assert found["weights"][learned].tolist() == [2, 2, 0.5, 1, 1, 1]


def test_pairs_are_batched_as_trl_does(processor: Any) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from hpc_rl.training import trl_parts  # noqa: F401

    pairs = [
        Pair("a", "", ids(5, 6), ids(7), ids(8, 9, 9)),
        Pair("b", "", ids(5), ids(6, 7), ids(7)),
    ]
    examples = [
        {name: getattr(pair, name).tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs
    ]
    theirs = as_lists(DataCollatorForPreference(pad_token_id=PAD)(examples))
    assert as_lists(made(collate.Pairs(PAD), *pairs)) == theirs
    assert as_lists(made(collate.Pairs(PAD), *pairs, weight=0)) == theirs, "its share of 0 takes a filler out"

    images = {"row": [Image.new("RGB", (56, 56), "red")]}
    prompt = rollout(processor, "row", images["row"], [95]).prompt_ids
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    pictures = Pictures(processor.image_processor, lambda row: images[row], image_id)
    found = made(collate.Pairs(PAD, pictures), Pair("c", "row", prompt, ids(95), ids(96, 97)))
    pixels, grids = pictures.of("row")
    assert torch.equal(found["pixel_values"], torch.cat([pixels, pixels]))
    assert torch.equal(found["image_grid_thw"], torch.cat([grids, grids])) and "num_images" not in found
    assert torch.equal(found["mm_token_type_ids"], (found["input_ids"] == image_id).long())
    with pytest.raises(UnusableData, match=r"the prompt of pair d has 0 image tokens, but its pictures make 4"):
        made(collate.Pairs(PAD, pictures), Pair("d", "row", ids(image_id + 1), ids(95), ids(96)))


def test_all_solutions_of_a_question_are_in_its_pass() -> None:
    questions = [
        Question("q", (Solution("a", ids(5, 6), 1, 0.5), Solution("b", ids(5, 6, 7), 0, float("nan")))),
        Question("r", (Solution("c", ids(8), 0, 1.5),)),
    ]
    found = made(collate.Solutions(PAD), *questions)
    assert found["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7], [8, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert found["question"].tolist() == [0, 0, 1] and found["label"].tolist() == [1, 0, 0]
    assert found["score"].nan_to_num(9).tolist() == [0.5, 9, 1.5]
