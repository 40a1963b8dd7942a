"""Reward models: TRL's losses where TRL has them, each question alike, scores as served, and learning in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpc_rl.engines.reward_model import RewardModel, TransformersJudge
from hpc_rl.training.algorithms import pair_losses
from hpc_rl.training.algorithms.judging import Objective, in_float32, padding_of, scores
from hpc_rl.training.algorithms.reward_model import RewardModel as Trainer
from hpc_rl.training.data import collate, plan, solutions
from hpc_rl.training.data.batches import Batches
from hpc_rl.training.data.plan import Shape
from hpc_rl.training.errors import UnusableData
from hpc_rl.training.trl_parts import RewardConfig, RewardTrainer
from tools.tiny_reward_model import write

Solved = tuple[str, str, bool]
"""A question, a solution, and whether it is right."""

PAIRS = [(f"What is {n} + 2?", f"step by step {n + 2}", "step " * (n + 1) + str(n)) for n in range(8)]
SHAPE = Shape(ranks=1, accumulation=2, batch=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights."""
    return write(tmp_path_factory.mktemp("models") / "reward")


def units(base: Path, folder: Path, rows: Iterable[Solved], **options: Any) -> Any:
    """Solutions, written and read back."""
    table = [
        {"question_id": question, "solution_id": f"s{n}", "question": question, "solution": text, "label": int(right)}
        for n, (question, text, right) in enumerate(rows)
    ]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "solutions.parquet")
    return solutions.read([folder / "solutions.parquet"], AutoTokenizer.from_pretrained(base), **options)


def settings(output: Path, shape: Shape = SHAPE, **more: Any) -> RewardConfig:
    return RewardConfig(
        output_dir=str(output), per_device_train_batch_size=shape.batch, logging_steps=1, num_train_epochs=1,
        gradient_accumulation_steps=shape.accumulation, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=False, remove_unused_columns=False, **more,
    )  # fmt: skip


def trainer(base: Path, made: Any, args: RewardConfig, kind: pair_losses.Loss = "pairs", penalty: float = 0.0) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Trainer(
        objective=Objective(kind, penalty, seed=0),
        batches=Batches(made, 0, collate.Solutions(padding_of(tokenizer, str(base)))),
        seal=lambda folder: None, args=args, processing_class=tokenizer,
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
    )  # fmt: skip


def steps(trained: Any) -> list[dict[str, float]]:
    """What each optimizer step logged."""
    trained.train()
    return [entry for entry in trained.state.log_history if "grad_norm" in entry]


def test_two_solutions_of_each_question_are_trls_pairs(base: Path, tmp_path: Path) -> None:
    chats = [
        {
            name: [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
            for name, said in (("chosen", right), ("rejected", wrong))
        }
        for question, right, wrong in PAIRS
    ]
    bare = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        processing_class=AutoTokenizer.from_pretrained(base), train_dataset=Dataset.from_list(chats),
        args=settings(tmp_path / "bare", train_sampling_strategy="sequential", learning_rate=1e-3),
    )  # fmt: skip
    rows = [(question, text, text is right) for question, right, wrong in PAIRS for text in (wrong, right)]
    made = plan.in_order(units(base, tmp_path / "data", rows), SHAPE)
    ours = steps(trainer(base, made, settings(tmp_path / "ours", learning_rate=1e-3)))
    theirs = steps(bare)
    assert len(ours) == 2
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], abs=1e-7)
    for name in ("accuracy", "margin", "mean_reward"):
        assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], abs=1e-6)


def many(questions: int, seed: int) -> list[Solved]:
    """Questions with two to four solutions. A right one is a number of at least 500, behind some words."""
    draw, rows = random.Random(seed), []
    for question in range(questions):
        right = draw.randrange(1, 3)
        for solution in range(right + draw.randrange(1, 3)):
            number = draw.randrange(500, 1000) if solution < right else draw.randrange(100, 500)
            words = " ".join(draw.choice(("step", "by", "so", "final")) for _ in range(draw.randrange(4)))
            rows.append((f"Say a large number, {question}.", f"{words} {number}", solution < right))
    return rows


@pytest.mark.parametrize("kind", ["pairs", "selected", "bce"])
def test_a_step_is_the_same_however_its_questions_are_dealt_out(base: Path, tmp_path: Path, kind: Any) -> None:
    """Seven questions: in one pass, in four of which one has a question less, in eight of which one has a filler."""
    asked = units(base, tmp_path / "data", many(7, seed=1))
    found = []
    for shape in (Shape(1, 1, 8), Shape(1, 4, 2), Shape(1, 8, 1)):
        made = plan.in_order(asked, shape)
        assert len(made) == 1
        found += steps(trainer(base, made, settings(tmp_path / f"{shape}", shape), kind, penalty=0.1))
    for step in found[1:]:
        for name in ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
            assert step[name] == pytest.approx(found[0][name], abs=1e-6)


def test_the_loss_is_that_of_the_scores_of_the_step(base: Path, tmp_path: Path) -> None:
    rows = many(4, seed=2)
    model = RewardModel(str(base), TransformersJudge(str(base)))
    judged = torch.tensor(model.scores([model.encode(question, text) for question, text, _ in rows]))
    sizes = [len([row for row in rows if row[0] == question]) for question in dict.fromkeys(row[0] for row in rows)]
    expected = pair_losses.loss("pairs", judged, torch.tensor([float(row[2]) for row in rows]), sizes, penalty=0.5)
    made = plan.in_order(units(base, tmp_path / "data", rows), SHAPE)
    (step,) = steps(trainer(base, made, settings(tmp_path / "ours"), penalty=0.5))
    assert step["loss"] == pytest.approx(float(expected), abs=1e-6)


def test_scores_in_bfloat16_are_those_that_are_served_and_no_two_tie(base: Path, tmp_path: Path) -> None:
    asked = units(base, tmp_path / "data", many(6, seed=3))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16).eval()
    batch = Batches(plan.in_order(asked, Shape(1, 1, 6)), 0, collate.Solutions(tokenizer.pad_token_id))[0]
    with torch.no_grad():
        found = scores(in_float32(model), batch)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    served = TransformersJudge(str(base), dtype="bfloat16").logits(rows)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(served, abs=1e-5)
    assert len(set(found.tolist())) == len(set(map(tuple, rows)))


def test_lora_trains_a_head_that_reckons_in_float32_and_is_merged_as_a_plain_one(base: Path) -> None:
    import peft

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
    with_adapter = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]), autocast_adapter_dtype=False
    )
    in_float32(with_adapter)
    found = with_adapter(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert found.dtype == torch.float32
    found.sum().backward()
    trained = {name for name, parameter in with_adapter.named_parameters() if parameter.grad is not None}
    assert any("modules_to_save.default.weight" in name for name in trained)
    assert {name.removeprefix("base_model.model.") for name in peft.get_peft_model_state_dict(with_adapter)} >= {
        "score.weight"
    }


def test_a_solution_that_ends_in_the_padding_token_is_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad_id = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], return_dict=False)[-1]
    with pytest.raises(UnusableData, match=f"ends in the padding token {pad_id}"):
        units(base, tmp_path / "data", many(2, seed=0), pad_id=pad_id)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token: set pad_token"):
        padding_of(tokenizer, str(base))


def accuracy(folder: Path, rows: Sequence[Solved]) -> float:
    """Of all pairs of a right and a wrong solution of a question, how many the served model puts in order."""
    model = RewardModel(str(folder), TransformersJudge(str(folder)))
    judged = model.scores([model.encode(question, text) for question, text, _ in rows])
    pairs = [
        better > worse
        for better, (question, _, right) in zip(judged, rows, strict=True)
        for worse, (other, _, wrong) in zip(judged, rows, strict=True)
        if question == other and right and not wrong
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(3))
def test_it_learns_to_tell_right_from_wrong_on_pairs_that_it_has_not_seen(tmp_path: Path, seed: int) -> None:
    folder = write(tmp_path / "base", seed=seed)
    held_out = many(60, seed=100 + seed)
    assert accuracy(folder, held_out) < 0.8
    shape = Shape(1, 1, 8)
    made = plan.make(units(folder, tmp_path / "data", many(160, seed)), shape, epochs=2, run_seed=seed, round=1)
    trained = trainer(folder, made, settings(tmp_path / "out", shape, learning_rate=3e-3, warmup_steps=5, seed=seed))
    assert len(steps(trained)) == 40
    trained.model.save_pretrained(tmp_path / "final")
    trained.processing_class.save_pretrained(tmp_path / "final")
    assert accuracy(tmp_path / "final", held_out) > 0.9
