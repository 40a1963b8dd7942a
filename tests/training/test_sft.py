"""Supervised fine-tuning: losses are those of bare TRL on the same data, packed or not, and weights weigh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpc_rl.config.training import SftTrainConfig
from hpc_rl.training.algorithms.sft import Sft
from hpc_rl.training.algorithms.weighted_sft import WeightedSft
from hpc_rl.training.data import collate, plan, texts
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.plan import Shape
from hpc_rl.training.trl_parts import SFTConfig, SFTTrainer
from tools.tiny_chat_model import write

EXAMPLES = [
    ("Is 2 + 3 = 5?", "yes"), ("no?", "no, the answer is 5. user"), ("Answer yes or no.", '{"answer": "no"}'),
    ("2", "system " * 9), ("Is it 5?", "no"), ("yes or no?", "yes, yes"), ("3 = 3?", "yes."), ("5?", "5 yes"),
]  # fmt: skip
SHAPE = Shape(ranks=1, accumulation=2, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    return write(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, with weights."""
    path = tmp_path_factory.mktemp("texts") / "texts.parquet"
    rows = [
        {"text_id": f"t{n}", "prompt": [{"role": "user", "content": ask}], "completion": answer, "weight": 0.25 * n}
        for n, (ask, answer) in enumerate(EXAMPLES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def settings(output: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output), per_device_train_batch_size=SHAPE.batch,
        gradient_accumulation_steps=SHAPE.accumulation, num_train_epochs=1, learning_rate=1e-2, logging_steps=1,
        max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, **{"save_strategy": "no", **more},
    )  # fmt: skip


def trained(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def ours(
    kind: type[Sft], model: Path, units: Any, maker: Any, output: Path, shape: Shape = SHAPE
) -> list[tuple[float, float]]:
    trainer = kind(
        batches=Batches(plan.in_order(units, shape), 0, maker), seal=lambda folder: None, args=settings(output),
        model=AutoModelForCausalLM.from_pretrained(model), processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    return trained(trainer)


def pad_of(model: Path) -> int:
    return int(AutoTokenizer.from_pretrained(model).pad_token_id)


def test_losses_are_those_of_trl(model: Path, file: Path, tmp_path: Path) -> None:
    """Chat template, labels and padding included; in the second step a difference in the first would show."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [
        {"prompt": [{"role": "user", "content": ask}], "completion": [{"role": "assistant", "content": answer}]}
        for ask, answer in EXAMPLES
    ]
    bare = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model), processing_class=tokenizer,
        args=settings(tmp_path / "bare", train_sampling_strategy="sequential"), train_dataset=Dataset.from_list(chats),
    )  # fmt: skip
    units = texts.read([file], tokenizer)
    found = ours(Sft, model, units, collate.Texts(pad_of(model)), tmp_path / "ours")
    assert len(found) == 2
    for one, other in zip(found, trained(bare), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_the_count_of_tokens_goes_on_after_a_resume(model: Path, file: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    units = texts.read([file], tokenizer)

    def counts(output: Path, resumed: str | None = None) -> list[int]:
        trainer = Sft(
            batches=Batches(plan.in_order(units, SHAPE), 0, collate.Texts(pad_of(model))), seal=lambda folder: None,
            args=settings(output, save_strategy="steps", save_steps=1),
            model=AutoModelForCausalLM.from_pretrained(model), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumed)
        return [int(entry["num_tokens"]) for entry in trainer.state.log_history if "num_tokens" in entry]

    whole = counts(tmp_path / "whole")
    assert len(whole) == 2 and 0 < whole[0] < whole[1]
    assert counts(tmp_path / "resumed", str(tmp_path / "whole/checkpoint-1")) == whole


def test_a_packed_text_has_the_log_probabilities_that_it_has_alone(model: Path, file: Path) -> None:
    """Whatever lies beside it in its row: no text sees another."""
    net = AutoModelForCausalLM.from_pretrained(model).eval()
    units = texts.read([file], AutoTokenizer.from_pretrained(model))
    packs = texts.pack(units, 64)
    assert len(packs) < len(units)

    def of_labels(batch: dict[str, Any]) -> torch.Tensor:
        labels = batch.pop("labels")[0, 1:]
        seen = {name: value for name, value in batch.items() if name not in ("units", "share")}
        found = net(**seen, use_cache=False).logits[0, :-1].log_softmax(-1)  # as in training: a cache knows no packs
        return found[labels != -100].gather(1, labels[labels != -100, None])[:, 0]

    one = Shape(ranks=1, accumulation=1, batch=1)
    with torch.no_grad():
        alone = [of_labels(batch) for batch in Batches(plan.in_order(units, one), 0, collate.Texts(0))]
        packed = [of_labels(batch) for batch in Batches(plan.in_order(packs, one), 0, collate.Packs())]
    order = [text.id for pack in packs.rows(slice(None)) for text in pack.texts]
    expected = torch.cat([alone[int(name[1:])] for name in order])
    assert torch.cat(packed) == pytest.approx(expected, abs=1e-5)


def test_packing_changes_no_loss(model: Path, file: Path, tmp_path: Path) -> None:
    """All texts in one step, once in rows that they share, once in rows of their own."""
    units = texts.read([file], AutoTokenizer.from_pretrained(model))
    packs = texts.pack(units, 64)
    every = Shape(ranks=1, accumulation=2, batch=4)
    packed = ours(Sft, model, packs, collate.Packs(), tmp_path / "packed", every)
    assert packed == [pytest.approx(loss, abs=1e-6) for loss in ours(
        Sft, model, units, collate.Texts(pad_of(model)), tmp_path / "each", every
    )]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_one_change_nothing_and_others_are_factors(
    model: Path, file: Path, tmp_path: Path, packed: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def of(weighted: bool, kind: type[Sft], source: Path, name: str) -> list[tuple[float, float]]:
        units: Any = texts.read([source], tokenizer, weighted=weighted)
        maker: Any = collate.Packs(weighted) if packed else collate.Texts(pad_of(model), weighted)
        units = texts.pack(units, 64) if packed else units
        return ours(kind, model, units, maker, tmp_path / name, Shape(1, 2, 4))

    plain = of(False, Sft, file, "plain")
    assert of(True, WeightedSft, reweighted(file, tmp_path, [1.0] * 8), "ones") == [
        pytest.approx(loss, abs=1e-7) for loss in plain
    ]
    halves = of(True, WeightedSft, reweighted(file, tmp_path, [0.5] * 8), "halves")
    assert halves[0][0] == pytest.approx(plain[0][0] / 2, abs=1e-7)


def test_the_loss_is_the_weighted_sum_over_the_steps_tokens(model: Path, file: Path, tmp_path: Path) -> None:
    """Two forward passes of other numbers of tokens: the normaliser is the whole step's, without weights."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    units = texts.read([file], tokenizer, weighted=True)
    total, count = 0.0, 0
    for text in units.rows(slice(None)):
        ids = torch.tensor([*text.prompt_ids, *text.completion_ids])[None].long()
        with torch.no_grad():
            scores = net(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total -= text.weight * float(scores[-len(text.completion_ids) :].sum())
        count += len(text.completion_ids)
    found = ours(WeightedSft, model, units, collate.Texts(pad_of(model), True), tmp_path, Shape(1, 2, 4))
    assert found[0][0] == pytest.approx(total / count, abs=1e-5)


def test_packing_needs_a_length() -> None:
    with pytest.raises(ValueError, match="packing fills rows of that many tokens"):
        SftTrainConfig(packing=True)
    assert SftTrainConfig(packing=True, max_length=64).packing


def reweighted(file: Path, folder: Path, weights: Sequence[float]) -> Path:
    """The same texts with other weights."""
    table = pq.read_table(file)
    path = folder / f"weights_{weights[0]}.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("weight"), "weight", pa.array(weights)), path)
    return path
