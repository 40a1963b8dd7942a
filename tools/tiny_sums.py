"""Sums that a tiny model answers wrongly, in a systematic way: what DPO, GRPO and ProSetting teach it within seconds.

"07+05=" is answered digit by digit, units first: "210". Most answers of the model's first lessons forget the carry, so
greedily it is right in one case of ten, but the right answer is among those that it samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc_rl.teachers import sums as sums_of_teacher
from hpc_rl.teachers.sums import DIGITS

NUMBERS = 50
"""Terms are 0 to 49."""
TOKENS = DIGITS + 1
"""Of an answer with its end."""
WRONG = 0.75
"""Share of first lessons that forget the carry."""
LESSONS = 600
TEMPLATE = """\
{%- for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}"""
"""Messages one after the other; what the assistant says ends."""

Sum = tuple[int, int]


def question(sum: Sum) -> str:
    """The prompt."""
    return sums_of_teacher.question(*sum)


def answer(sum: Sum) -> str:
    """Units first."""
    return sums_of_teacher.answer(*sum)


def forgetful(sum: Sum) -> str:
    """The answer without the carry; of a sum that has none, another wrong one."""
    (a, b), (units, tens) = sum, (sum[0] % 10 + sum[1] % 10, sum[0] // 10 + sum[1] // 10)
    if units > 9:
        return f"{units % 10}{tens % 10}{tens // 10}"
    return answer((a, b + 1 if a + b < 2 * NUMBERS - 3 else b - 1))


def sums(seed: int = 0) -> tuple[list[Sum], list[Sum]]:
    """All sums, to learn from and to be tested on."""
    every = [(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    random.Random(seed).shuffle(every)
    return every[400:], every[:400]


def tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", *"0123456789+="]
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", padding_side="left", chat_template=TEMPLATE
    )


def untaught(seed: int = 0) -> Any:
    """A Llama of 132 000 parameters: transformers has no tokenizer of its own for that family."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=14, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def save(model: Any, folder: Path) -> Path:
    """As a model folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def teach_wrong(folder: Path, seed: int = 0, lessons: int = LESSONS) -> Path:
    """Write a model that forgets the carry more often than not."""
    import torch

    model, speaks, draw = untaught(seed), tokenizer(), random.Random(seed)
    known = sums(seed)[0]
    known = known[: len(known) // 2]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.1, 1 - step / lessons)
    )
    model.train()
    for _ in range(lessons):
        taught = [(s, forgetful(s) if draw.random() < WRONG else answer(s)) for s in draw.choices(known, k=128)]
        ids = torch.tensor([speaks(question(s) + said)["input_ids"] + [1] for s, said in taught])
        labels = ids.clone()
        labels[:, : len(question((0, 0)))] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return save(model, folder)


def accuracy(model: Any, of: Sequence[Sum], right: Callable[[Sum], str] = answer) -> float:
    """Share of sums that a model answers as `right` says, taking the likeliest token each time."""
    import torch

    speaks = tokenizer()
    asked = torch.tensor([speaks(question(s))["input_ids"] for s in of])
    model.eval()
    with torch.no_grad():
        found = model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=TOKENS, do_sample=False
        )
    said = [speaks.decode(row).replace("<pad>", "") for row in found[:, asked.size(1) :].tolist()]
    return sum(one == right(s) + "<eos>" for one, s in zip(said, of, strict=True)) / len(of)
