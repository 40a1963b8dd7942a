"""DPO: losses are those of bare TRL on the same pairs, texts or pictures, whatever the reference comes from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from hpc_rl.config.modeling import LoraConfig, SpeakerConfig, TrainedModelConfig
from hpc_rl.config.training import DpoTrainConfig
from hpc_rl.training import logprobs, models
from hpc_rl.training.algorithms.dpo import Dpo, dpo_config
from hpc_rl.training.base import ROWS, SHARE, UNITS
from hpc_rl.training.data import pairs, plan
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.collate import ByPlace, Pairs
from hpc_rl.training.data.pairs import Pair
from hpc_rl.training.data.pixels import Pictures
from hpc_rl.training.data.plan import Plan, Shape
from hpc_rl.training.trl_parts import DPOConfig, DPOTrainer, add_fused_lm_head
from tools import tiny_sums
from tools.tiny_chat_model import write
from tools.tiny_model import SIDE

EXAMPLES = [
    ("Is 2 + 3 = 5?", "yes", "no"), ("no?", "no, the answer is 5. user", "2"), ("Answer yes or no.", "no", "system"),
    ("2", "system " * 9, "system"), ("Is it 5?", "no", "yes or no"), ("yes or no?", "yes, yes", "no"),
    ("3 = 3?", "yes.", '{"answer": "no"}'), ("5?", "5 yes", "5 no"),
]  # fmt: skip
SHAPE = Shape(ranks=1, accumulation=2, batch=2)
LORA = LoraConfig(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj"))
SPEAKER = Path("models/tiny-lewis/speaker")
Losses = list[tuple[float, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model."""
    return write(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples."""
    rows = [
        {"pair_id": f"p{n}", "prompt": [{"role": "user", "content": ask}], "chosen": good, "rejected": bad}
        for n, (ask, good, bad) in enumerate(EXAMPLES)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def common(output: Path, shape: Shape = SHAPE) -> dict[str, Any]:
    return {
        "output_dir": str(output), "per_device_train_batch_size": shape.batch,
        "gradient_accumulation_steps": shape.accumulation, "num_train_epochs": 1, "learning_rate": 1e-2,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip


def trained(trainer: Any) -> Losses:
    """Loss and gradient norm of each step."""
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def trainer_of(
    section: TrainedModelConfig, options: DpoTrainConfig, made: Plan[Pair], maker: Pairs, processor: Any,
    adapter: Path | None = None, **arguments: Any,
) -> Dpo:  # fmt: skip
    """Our trainer, with the reference that the options ask for."""
    base = str(section.path)
    args, makers, live = dpo_config(options, **arguments), [maker], None
    frozen = models.load_frozen(section, base, adapter, deepspeed=False)
    if options.reference == "live":
        live = frozen
    else:
        add_fused_lm_head(frozen)
        with torch.no_grad():
            known = np.concatenate([
                np.stack(logprobs.pairs(frozen, {n: t for n, t in batch.items() if n not in (UNITS, SHARE, ROWS)}))
                for batch in Batches(plan.in_order(made.units, Shape(1, 1, 4)), 0, maker)
            ])  # fmt: skip
        makers.append(ByPlace(ref_chosen_logps=known[:, 0], ref_rejected_logps=known[:, 1]))
    trainer = Dpo(
        batches=Batches(made, 0, *makers), seal=lambda folder: None, args=args, ref_model=live,
        model=models.load(section, base, adapter, deepspeed=False, seed=1), processing_class=processor,
    )  # fmt: skip
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters()), "no second adapter"
    assert names, "and the first one is trained"
    return trainer


def ours(
    section: TrainedModelConfig, options: DpoTrainConfig, units: Any, maker: Pairs, processor: Any, output: Path,
    shape: Shape = SHAPE, adapter: Path | None = None,
) -> Losses:  # fmt: skip
    """Losses of our trainer on all pairs in order."""
    made = plan.in_order(units, shape)
    return trained(trainer_of(section, options, made, maker, processor, adapter, **common(output, shape)))


def bare(
    section: TrainedModelConfig, data: Dataset, processor: Any, output: Path, adapter: Path | None = None, **more: Any
) -> Losses:
    """Losses of TRL's own."""
    args = DPOConfig(**common(output), max_length=None, train_sampling_strategy="sequential", **more)
    return trained(DPOTrainer(
        model=models.load(section, str(section.path), adapter, deepspeed=False, seed=1), args=args,
        train_dataset=data, processing_class=processor,
    ))  # fmt: skip


def adapter_of(section: TrainedModelConfig, folder: Path) -> Path:
    """What a round before may have left."""
    model = models.load(section, str(section.path), None, deepspeed=False, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def chats() -> Dataset:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": ask}], "chosen": said(good), "rejected": said(bad)}
        for ask, good, bad in EXAMPLES
    ])  # fmt: skip


def assert_same(found: Losses, expected: Losses) -> None:
    assert len(found) == len(EXAMPLES) // SHAPE.samples
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("lora", "later", "reference", "options", "trl"),
    [
        (None, False, "pass", {"beta": 0.3}, {"beta": 0.3}),
        (LORA, False, "pass", {"beta": 2.0, "nll_weight": 0.7}, {
            "beta": 2.0, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
        (LORA, False, "live", {"beta": 2.0, "label_smoothing": 0.2}, {
            "beta": 2.0, "loss_type": ["robust"], "label_smoothing": 0.2}),
        (LORA, True, "pass", {"beta": 0.5}, {"beta": 0.5}),
        (LORA, True, "live", {"beta": 0.5}, {"beta": 0.5}),
    ],
)  # fmt: skip
def test_losses_are_those_of_trl(
    model: Path, file: Path, tmp_path: Path, lora: LoraConfig | None, later: bool, reference: Any, options: Any,
    trl: Any,
) -> None:  # fmt: skip
    """Chat template, masks and padding included; the second step shows what the first one trained.

    In a `later` round the model has an adapter to begin with, and so has the reference: the first loss is log 2.
    """
    section = TrainedModelConfig(path=str(model), dtype="float32", lora=lora)
    adapter = adapter_of(section, tmp_path / "adapter") if later else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    units = pairs.read([file], tokenizer)
    found = ours(
        section, DpoTrainConfig(reference=reference, **options), units, Pairs(tokenizer.pad_token_id), tokenizer,
        tmp_path / "ours", adapter=adapter,
    )  # fmt: skip
    assert_same(found, bare(section, chats(), tokenizer, tmp_path / "bare", adapter, **trl))
    if later:
        assert found[0][0] == pytest.approx(math.log(2), abs=1e-5), "the reference is the policy itself"


def test_losses_of_pairs_with_pictures_are_those_of_trl(tmp_path: Path) -> None:
    """Of TRL's own way with images, whose reference goes through the model with each batch."""
    processor = AutoProcessor.from_pretrained(SPEAKER)
    tokenizer = processor.tokenizer
    colours = ["red", "green", "blue", "white", "grey", "black", "pink", "brown"]
    shown = [Image.new("RGB", (SIDE, SIDE), colour) for colour in colours]
    ask = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    answers = [(f"{good} {colour}<|im_end|>\n", f"{bad}<|im_end|>\n")
               for colour, (_, good, bad) in zip(colours, EXAMPLES, strict=True)]  # fmt: skip
    data = Dataset.from_list([
        {"images": [picture], "prompt": ask, "chosen": good, "rejected": bad}
        for picture, (good, bad) in zip(shown, answers, strict=True)
    ])  # fmt: skip
    rows = [
        {
            "pair_id": f"p{n}", "row_id": str(n),
            "prompt_token_ids": processor(images=[shown[n]], text=[ask])["input_ids"][0],
            "chosen_token_ids": tokenizer(good)["input_ids"], "rejected_token_ids": tokenizer(bad)["input_ids"],
        }
        for n, (good, bad) in enumerate(answers)
    ]  # fmt: skip
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    units = pairs.read([path], tokenizer, with_rows=True)
    section = SpeakerConfig(path=str(SPEAKER), dtype="float32")
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pictures = Pictures(processor.image_processor, lambda row: [shown[int(row)]], image_id)
    maker = Pairs(tokenizer.pad_token_id, pictures)
    found = ours(section, DpoTrainConfig(beta=0.3), units, maker, processor, tmp_path / "ours")
    assert_same(found, bare(section, data, processor, tmp_path / "bare", beta=0.3))


def test_a_forward_pass_of_a_filler_alone_changes_nothing(model: Path, file: Path, tmp_path: Path) -> None:
    """One step of eight pairs, once in as many passes, once in twelve, of which four have nothing to do."""
    section, tokenizer = TrainedModelConfig(path=str(model), dtype="float32"), AutoTokenizer.from_pretrained(model)
    units, maker = pairs.read([file], tokenizer), Pairs(tokenizer.pad_token_id)
    full, sparse = (
        ours(section, DpoTrainConfig(nll_weight=1.0), units, maker, tokenizer, tmp_path, Shape(1, passes, 1))
        for passes in (8, 12)
    )
    assert len(full) == 1
    assert full == [pytest.approx(loss, abs=1e-6) for loss in sparse]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_pairs_lift_a_model_from_one_in_ten_to_eight_in_ten(forgetful: Path, tmp_path: Path, seed: int) -> None:
    """The right answer to each sum is preferred to the one that forgets the carry; tested on other sums."""
    known, tested = tiny_sums.sums()
    tokenizer, path = tiny_sums.tokenizer(), tmp_path / "pairs.parquet"

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    rows = [
        {
            "pair_id": str(one), "prompt_token_ids": ids(tiny_sums.question(one)),
            "chosen_token_ids": [*ids(tiny_sums.answer(one)), tokenizer.eos_token_id],
            "rejected_token_ids": [*ids(tiny_sums.forgetful(one)), tokenizer.eos_token_id],
        }
        for one in known
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    shape = Shape(ranks=1, accumulation=1, batch=128)
    made = plan.make(pairs.read([path], tokenizer), shape, epochs=6, run_seed=seed, round=1)
    trainer = trainer_of(
        TrainedModelConfig(path=str(forgetful), dtype="float32"), DpoTrainConfig(nll_weight=1.0), made,
        Pairs(tokenizer.pad_token_id), tokenizer,
        **common(tmp_path, shape) | {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10,
                                     "adam_beta2": 0.98, "logging_steps": 50},
    )  # fmt: skip
    before = tiny_sums.accuracy(trainer.model, tested)
    trainer.train()
    after = tiny_sums.accuracy(trainer.model, tested)
    assert before < 0.25 and after > 0.8, (before, after)
