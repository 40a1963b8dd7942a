"""Texts and chats become the tokens that an engine reads and samples; packs hold them all, and none sees another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.engines.base import Prompt, render
from hpc_rl.engines.loading import load_processor, tokenizer_of
from hpc_rl.training.data import collate, plan, texts
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.plan import Shape
from hpc_rl.training.data.texts import Text
from hpc_rl.training.data.units import INDEX, Units, alone
from hpc_rl.training.errors import UnusableData


@pytest.fixture(scope="module")
def tokenizer(speaker: Path) -> Any:
    return tokenizer_of(load_processor(speaker))


def read(folder: Path, tokenizer: Any, columns: Mapping[str, Any], **options: Any) -> list[Text]:
    pq.write_table(pa.table(dict(columns)), folder / "texts.parquet")
    found = texts.read([folder / "texts.parquet"], tokenizer, **options)
    return found.rows(np.arange(len(found)))


def test_a_chat_is_what_the_engine_reads_and_the_answer_ends_as_the_template_says(
    tmp_path: Path, tokenizer: Any
) -> None:
    chats = [
        [{"role": "user", "content": "yes no"}],
        [{"role": "system", "content": "red"}, {"role": "user", "content": "ring"}],
    ]
    found = read(tmp_path, tokenizer, {"text_id": ["a", "b"], "prompt": chats, "completion": ["Yes", "a ring"]})
    for text, chat, answer in zip(found, chats, ("Yes", "a ring"), strict=True):
        assert tokenizer.decode(text.prompt_ids) == render(tokenizer, Prompt(tuple(chat)))
        assert tokenizer.decode(text.completion_ids) == f"{answer}{tokenizer.eos_token}\n"


def test_a_plain_text_ends_in_the_token_that_ends_a_completion(tmp_path: Path, tokenizer: Any) -> None:
    columns = {"text_id": ["a"], "prompt": ["yes no"], "completion": [" Yes"]}
    (found,) = read(tmp_path, tokenizer, columns)
    assert found.prompt_ids.tolist() == tokenizer("yes no")["input_ids"]
    assert found.completion_ids.tolist() == [*tokenizer(" Yes")["input_ids"], tokenizer.eos_token_id]
    (kept,) = read(tmp_path, None, {**columns, "prompt_token_ids": [[7]], "completion_token_ids": [[8, 9]]})
    assert (kept.prompt_ids.tolist(), kept.completion_ids.tolist()) == ([7], [8, 9]), "token ids come first"


def chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("prompts", "completion", "template", "complaint"),
    [
        (
            [chat("yes"), chat("<|im_end|> no")],
            "x",
            None,
            r"row 1, text_id t1, column prompt: .* control token <\|im_end",
        ),
        ([chat("yes")], "no <|im_start|>", None, r"row 0, text_id t0, column completion: .* control token <\|im_start"),
        ([chat("yes")], "no", "{{ raise_exception('no chats') }}", r"does not take these messages: no chats"),
        (
            [chat("yes")],
            "no",
            "{{ messages | length }}",
            r"column completion: the chat template does not show an answer",
        ),
        (
            [chat("yes"), [{"role": "user", "content": None}]],
            "no",
            None,
            r"row 1, text_id t1, .* a part of it is missing",
        ),
        (["yes", ""], "no", None, r"row 1, text_id t1, column prompt: it has no tokens"),
    ],
)
def test_what_cannot_be_shown_to_the_model_is_named(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[Any], completion: str,
    template: str | None, complaint: str,
) -> None:  # fmt: skip
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    ids = [f"t{number}" for number in range(len(prompts))]
    with pytest.raises(UnusableData, match=complaint):
        read(tmp_path, tokenizer, {"text_id": ids, "prompt": prompts, "completion": [completion] * len(ids)})


def units_of(lengths: list[int]) -> Units[Text]:
    """Texts of these lengths, in memory; their tokens differ."""
    made = [
        Text(str(n), np.arange(1, 2, dtype=np.int32) + n, np.arange(2, length + 1, dtype=np.int32) + n)
        for n, length in enumerate(lengths)
    ]
    index = np.zeros(len(made), np.dtype(INDEX))
    index["row"], index["length"], index["id_hash"] = np.arange(len(made)), lengths, np.arange(len(made)) * 977
    return Units(index, alone(len(made)), lambda places: [made[place["row"]] for place in places], "d")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=60), st.integers(30, 40))
def test_packs_hold_every_text_once_and_not_more_than_fits(lengths: list[int], room: int) -> None:
    packs = texts.pack(units_of(lengths), room)
    found = packs.rows(np.arange(len(packs)))
    assert Counter(text.id for pack in found for text in pack.texts) == dict.fromkeys(map(str, range(len(lengths))), 1)
    sizes = [sum(len(text.prompt_ids) + len(text.completion_ids) for text in pack.texts) for pack in found]
    assert sizes == packs.lengths.tolist() and max(sizes) <= room
    emptiest = sorted(sizes)[:2]
    assert len(sizes) == 1 or sum(emptiest) > room, "no two packs would fit into one"
    assert texts.pack(units_of(lengths), room).index.tobytes() == packs.index.tobytes(), "always the same packs"


def test_a_text_that_no_pack_takes_is_named() -> None:
    with pytest.raises(UnusableData, match="text 1 has 9 tokens, but a pack has room for 8: raise max_length"):
        texts.pack(units_of([3, 9, 4]), 8)


def test_texts_of_a_pack_do_not_see_each_other() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=99, num_key_value_heads=1, attn_implementation="sdpa", **shape)
    model = Qwen2ForCausalLM(config).eval()
    units = units_of([5, 9, 4, 7, 3, 6])
    shape_of_pass = Shape(1, 1, 2)
    packs = texts.pack(units, 12)
    made = plan.in_order(packs, shape_of_pass)
    single = plan.in_order(units, Shape(1, 1, 1))
    alone_ = {batch["units"][0]: _logprobs(model, batch) for batch in Batches(single, 0, collate.Texts(0)).loader()}
    seen = 0
    for batch in Batches(made, 0, collate.Packs()).loader():
        names = [name for pack in batch["units"] for name in pack.split("+")]
        together = _logprobs(model, batch)
        assert together.tolist() == pytest.approx(torch.cat([alone_[name] for name in names]).tolist(), abs=1e-5)
        seen += len(names)
    assert seen == 6


@torch.no_grad()
def _logprobs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of the tokens that have labels."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    labels = batch["labels"][0, 1:]
    found = (
        model(**inputs, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    )
    return torch.as_tensor(found[labels >= 0])
