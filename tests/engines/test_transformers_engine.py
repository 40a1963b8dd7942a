"""The transformers engine: the same samples however they are batched, and log-probs of what was sampled from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rl.engines.base import BAN_BIAS, Completion, Prompt, Request, Sampling, banned_ids, end_ids, generate
from hpc_rl.engines.loading import ModelFolderError, load_model, load_processor
from hpc_rl.engines.merging import lora_rank, merge_adapter
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.engines.yes_no_prompts import surface_forms

from .conftest import PIXELS, TEXT, pictures, requests

SAMPLING = Sampling(temperature=1.0, max_tokens=12)


@pytest.fixture(scope="module")
def engine(speaker_folder: Path) -> TransformersEngine:
    return TransformersEngine(str(speaker_folder), **PIXELS)


def teacher_forced(
    folder: Path, request: Request, completion: Completion, temperature: float, adapter: Any = None
) -> Any:
    """Log-probs of a completion's tokens by one plain forward pass, bans and temperature applied by hand."""
    processor = load_processor(folder, **PIXELS)
    model: Any = load_model(folder, "float32", "sdpa", torch.device("cpu"))
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    image = processor.image_processor(images=list(request.prompt.images), return_tensors="pt")
    ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
    types = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=types, **image).logits[
            0, len(completion.prompt_token_ids) - 1 : -1
        ]
    logits[:, list(banned_ids(folder, processor.tokenizer))] += BAN_BIAS
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_tempered_distribution(
    engine: TransformersEngine, speaker_folder: Path, temperature: float
) -> None:
    asked = requests(samples=1)
    for request, completion in zip(asked, generate(engine, asked, Sampling(temperature, 12)), strict=True):
        expected = teacher_forced(speaker_folder, request, completion, temperature)
        assert torch.tensor(completion.logprobs) == pytest.approx(expected, abs=1e-4)


def test_samples_depend_on_their_seed_and_not_on_their_batch(engine: TransformersEngine) -> None:
    asked = requests()
    together = generate(engine, asked, SAMPLING)
    assert generate(engine, asked, SAMPLING) == together
    alone = [generate(engine, [request], SAMPLING)[0] for request in asked]
    backwards = generate(engine, asked[::-1], SAMPLING)[::-1]
    for one, other, third in zip(together, alone, backwards, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
    assert len({completion.token_ids for completion in together[:4]}) == 4


def test_greedy_takes_the_likeliest_token_whatever_the_seed(engine: TransformersEngine, speaker_folder: Path) -> None:
    greedy = generate(engine, requests(samples=2), Sampling(0.0, 6))
    assert [c.token_ids for c in greedy[::2]] == [c.token_ids for c in greedy[1::2]]
    expected = teacher_forced(speaker_folder, requests(samples=1)[0], greedy[0], 1.0)
    assert torch.tensor(greedy[0].logprobs) == pytest.approx(expected, abs=1e-4)


def test_control_tokens_are_never_sampled_and_the_end_is(engine: TransformersEngine, speaker_folder: Path) -> None:
    processor = load_processor(speaker_folder, **PIXELS)
    banned, ends = banned_ids(speaker_folder, processor.tokenizer), end_ids(speaker_folder, processor.tokenizer)
    names = set(processor.tokenizer.convert_ids_to_tokens(list(banned)))
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"} <= names
    assert not set(banned) & set(ends)
    # At this temperature tokens are nearly uniform: one in seventy would be a control token if they were not banned.
    sampled = generate(engine, requests(samples=16), Sampling(2.0, 40))
    tokens = [token for completion in sampled for token in completion.token_ids]
    assert len(tokens) > 1500 and not set(tokens) & set(banned)
    assert {"stop", "length"} == {completion.finish_reason for completion in sampled}
    for completion in sampled:
        ended = completion.token_ids[-1] in ends
        assert ended == (completion.finish_reason == "stop")
        assert not set(completion.token_ids[:-1]) & set(ends)
        assert "<|" not in completion.text


def test_images_are_resized_to_the_pixel_limits(engine: TransformersEngine, speaker_folder: Path) -> None:
    processor = load_processor(speaker_folder, **PIXELS)
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = [c.prompt_token_ids.count(pad) for c in generate(engine, requests(samples=1), Sampling(0.0, 1))]
    assert counts[0] == 4  # 56 × 56 pixels, patches of 14, merged 2 × 2
    assert counts[1] == 1  # scaled up to min_pixels = 28 × 28
    assert all(count * 28 * 28 <= PIXELS["max_pixels"] for count in counts)


def test_a_prompt_may_have_several_images_or_none(engine: TransformersEngine) -> None:
    first, second = pictures()[0], pictures()[2]
    several = Request(Prompt.of(TEXT, first, second), 1)
    turned = Request(Prompt.of(TEXT, second, first), 1)
    none = Request(Prompt.of(TEXT), 1)
    batch = generate(engine, [several, turned, several], SAMPLING)
    assert batch[0].token_ids == batch[2].token_ids
    # rows of one batch may differ in the last bits
    assert batch[0].logprobs == pytest.approx(batch[2].logprobs, abs=1e-5)
    assert batch[0].logprobs != pytest.approx(batch[1].logprobs, abs=1e-4)
    assert len(generate(engine, [none], SAMPLING)[0].token_ids) > 0


def test_an_adapter_is_what_peft_computes_and_merging_changes_nothing(
    speaker_folder: Path, adapter_folder: Path, engine: TransformersEngine, tmp_path: Path
) -> None:
    adapted = TransformersEngine(str(speaker_folder), adapter_folder, **PIXELS)
    merged = TransformersEngine(str(speaker_folder), adapter_folder, merge=True, **PIXELS)
    base = Path(shutil.copytree(speaker_folder, tmp_path / "read-only"))
    for path in (*base.iterdir(), base):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = merge_adapter(base, adapter_folder, "float32", tmp_path / "merged")
    assert all(path.stat().st_mode & 0o200 for path in (folder, *folder.iterdir()))
    from_disk = TransformersEngine(str(folder), **PIXELS)
    asked = requests(samples=1)
    plain = generate(engine, asked, SAMPLING)
    by_adapter = generate(adapted, asked, SAMPLING)
    assert [c.token_ids for c in by_adapter] != [c.token_ids for c in plain]
    for other in (merged, from_disk):
        for one, two in zip(by_adapter, generate(other, asked, SAMPLING), strict=True):
            assert one.token_ids == two.token_ids
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    expected = teacher_forced(speaker_folder, asked[0], by_adapter[0], 1.0, adapter_folder)
    assert torch.tensor(by_adapter[0].logprobs) == pytest.approx(expected, abs=1e-4)
    assert lora_rank(adapter_folder) == 4


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no model folder: it has no config\.json"):
        load_processor(tmp_path, **PIXELS)


def test_all_single_tokens_that_spell_a_word_are_found(speaker_folder: Path) -> None:
    tokenizer = load_processor(speaker_folder, **PIXELS).tokenizer
    forms = surface_forms(tokenizer, "a")
    assert {tokenizer.decode([index]) for index in forms} == {"A", "a", " a"}
    with pytest.raises(ModelFolderError, match="spells 'yes'"):
        surface_forms(tokenizer, "yes")
