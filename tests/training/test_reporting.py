"""What a training says: numbers and texts in TensorBoard, tokens per second, memory, MFU, debug files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen2Config

from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.algorithms import mismatch
from hpc_rl.training.algorithms.mismatch import FirstStep
from hpc_rl.training.finishing import numbers
from hpc_rl.training.reporting import samples_log, throughput
from hpc_rl.training.reporting.samples_log import Samples, shown
from hpc_rl.training.reporting.throughput import Meter
from jobs import train
from tests.training import small
from tests.training.conftest import NewRun
from tools import tiny_chat_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_chat_model.write(tmp_path_factory.mktemp("chat") / "model"))


def ids(tokenizer: Any, *texts: str, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) of texts, padded, and their mask."""
    made = tokenizer(list(texts), padding=True, padding_side="left" if left else "right", return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


def board(ws: Workspace) -> EventAccumulator:
    """All of a training's TensorBoard."""
    events = EventAccumulator(str(ws.tb_dir / "round_01" / "train"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_has_cost_and_texts_of_each_step(plain: Workspace) -> None:
    events, steps = board(plain), manifest.read(plain, 1, "train", 0).metrics["steps"]
    for name in ("step_s", "tokens_per_s"):
        points = events.Scalars(f"train/throughput/{name}")
        assert [point.step for point in points] == list(range(1, steps + 1))
        assert all(point.value > 0 for point in points)
    assert events.Scalars("train/memory/host_peak_gib")[-1].value > 0.1
    texts = events.Tensors("texts/3/text_summary")
    assert len(texts) == steps
    said = texts[0].tensor_proto.string_val[0].decode()
    assert "advantages" in said and "---" in said and "<|image_pad|>…" in said


def test_the_manifest_has_what_steps_cost(plain: Workspace) -> None:
    metrics = manifest.read(plain, 1, "train", 0).metrics
    per_step = [point.value for point in board(plain).Scalars("train/throughput/step_s")]
    assert metrics["mean_step_s"] == pytest.approx(sum(per_step) / len(per_step), rel=1e-3)
    assert metrics["mean_tokens_per_s"] > 0 and metrics["peak_host_gib"] > 0.1


def test_in_debug_mode_each_sample_of_a_rank_is_written_down(new_run: NewRun) -> None:
    ws = new_run("logging.debug=true", "train.log_completions=0")
    assert train.main(["--workspace", str(ws.root), "--round", "1"]) == 0
    metrics = manifest.read(ws, 1, "train", 0).metrics
    (file,) = ws.log_dir(1, "train").glob("debug_speaker_0_*.txt")
    found = re.findall(r"^---- step (\d+) (\S+), advantages (\S+)$", file.read_text(), re.MULTILINE)
    assert len(found) == len({sample for _, sample, _ in found}) == metrics["used_samples"]
    assert {int(step) for step, _, _ in found} == set(range(1, metrics["steps"] + 1))
    assert "texts/0/text_summary" not in board(ws).Tags()["tensors"]


def test_tokens_are_counted_without_padding_and_saving_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 40.0, 45.0, 45.0])  # begun; saving; measured; begun again
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(clock))
    meter, ones = Meter(), torch.ones(2, 3, dtype=torch.long)
    meter.count({"prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": ones.tril()})
    meter.count({"input_ids": ones, "attention_mask": ones.triu(), "completion_mask": ones})  # pairs
    packed = torch.arange(3).repeat(2)[None]
    meter.count({"input_ids": packed, "position_ids": packed, "cu_seq_lens_q": torch.tensor([0, 3, 6])})  # no padding
    with meter.paused():
        pass
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
    assert meter._rows == 2 + 2 + 2  # of packed ones the texts
    found = meter.measured(trainer, steps=5)
    assert found["throughput/step_s"] == (45 - 30) / 5
    assert found["throughput/tokens_per_s"] == ((6 + 3) + 5 + 6) / 15


def test_mfu_of_a_model_is_that_of_its_matrices() -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000,
    )  # fmt: skip
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 256  # queries, keys, values; output; MLP
    per_token = 6 * (3 * layer + 64 * 1000) + 3 * 6 * 64 * 10  # attention to (10 tokens)/2, scores and values
    assert throughput.mfu(config, False, 1e6, 10, 4, 1e12) == pytest.approx(100 * per_token * 1e6 / 4e12)
    assert throughput.mfu(config, True, 1e6, 10, 4, 1e12) == pytest.approx(100 * per_token * 1e6 / 4e12 * 2 / 3)


def whoever_trains(model: Any, **more: Any) -> Any:
    """A trainer, as far as the MFU asks for one, in bfloat16."""
    args = SimpleNamespace(bf16=True, fp16=False)
    return SimpleNamespace(accelerator=Accelerator(cpu=True), model=model, args=args, **more)


H100 = "NVIDIA H100 80GB HBM3"


def test_models_whose_layers_cannot_be_counted_have_no_mfu_and_train_on() -> None:
    known = [transformers.LlamaConfig(), Qwen2Config(), transformers.Gemma2Config(), transformers.Qwen3MoeConfig()]
    assert all(throughput.mfu_or_none(config, False, 1e4, 512, 1, 1e15) for config in known)
    others = [
        transformers.GPT2Config(), transformers.GPTNeoXConfig(), transformers.MixtralConfig(),
        transformers.GptOssConfig(), transformers.DeepseekV2Config(), transformers.DeepseekV3Config(),
        transformers.Qwen3NextConfig(), transformers.Qwen2MoeConfig(), transformers.MambaConfig(),
    ]  # fmt: skip
    assert [throughput.mfu_or_none(config, False, 1e4, 512, 1, 1e15) for config in others] == [None] * len(others)
    small_gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    gpt2 = whoever_trains(transformers.GPT2LMHeadModel(small_gpt2))
    assert throughput._mfu(gpt2, 1e4, 10, 1, H100) is None
    assert throughput._mfu(whoever_trains(torch.nn.Linear(2, 2)), 1e4, 10, 1, H100) is None


def test_a_score_head_is_no_head_of_logits_and_two_models_have_no_mfu() -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, num_labels=1,
    )  # fmt: skip
    policy = whoever_trains(transformers.Qwen2ForCausalLM(config))
    judge = whoever_trains(transformers.Qwen2ForSequenceClassification(config))
    found, of_judge = (throughput._mfu(one, 1e6, 10, 4, H100) for one in (policy, judge))
    assert found is not None and of_judge is not None
    assert found - of_judge == pytest.approx(100 * 6 * 64 * 999 * 1e6 / (4 * 989e12))
    assert config.vocab_size == 1000
    both = whoever_trains(policy.model, second=judge.model)
    assert throughput._mfu(both, 1e6, 10, 4, H100) is None


def test_rows_of_every_kind_of_batch_are_shown_as_text(tokenizer: Any) -> None:
    prompt_ids, prompt_mask = ids(tokenizer, "Is 2 + 3 = 5?", "Is 2?", left=True)
    completion_ids, completion_mask = ids(tokenizer, "yes", "no no no")
    rollouts = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "advantages": torch.tensor([0.5, -0.5]),
    }  # fmt: skip
    assert [(row.title, row.prompt, row.completion) for row in shown(rollouts, ["a", "b"], tokenizer)] == [
        ("a, advantages 0.5", "Is 2 + 3 = 5?", "yes"),
        ("b, advantages -0.5", "Is 2?", "no no no"),
    ]
    assert [row.title for row in shown(rollouts, (), tokenizer, 1)] == ["advantages 0.5"]  # sampled live
    input_ids, mask = ids(tokenizer, "2 + 3 yes", "2 + 3 no")
    answer = torch.zeros_like(mask)
    answer[:, -1] = 1  # one token each
    pairs = {"input_ids": input_ids, "attention_mask": mask, "completion_mask": answer}
    assert [row.title for row in shown(pairs, ["p"], tokenizer)] == ["p, chosen", "p, rejected"]
    assert [row.completion.strip() for row in shown(pairs, ["p"], tokenizer)] == ["yes", "no"]
    texts = {"input_ids": input_ids, "labels": input_ids.where(answer.bool(), -100), "weights": 0.25 * mask}
    assert shown(texts, ["t", "u"], tokenizer)[1].title == "u, weights 0.25"
    solutions = {
        "input_ids": input_ids, "attention_mask": mask, "question": torch.tensor([0, 0]),
        "label": torch.tensor([1, 0]),
    }  # fmt: skip
    assert [(row.title, row.completion) for row in shown(solutions, ["q"], tokenizer)] == [
        ("q, label 1", "2 + 3 yes"),
        ("q, label 0", "2 + 3 no"),
    ]


def test_fillers_are_not_shown_and_repeated_tokens_once(tokenizer: Any) -> None:
    input_ids, mask = ids(tokenizer, "<|image_pad|>" * 9 + "yes", "no")
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.where(mask.bool(), -100)}
    batch["labels"][1] = -100
    (row,) = shown(batch, ["a", "filler"], tokenizer)
    assert row.completion == "<|image_pad|>…yes"
    assert samples_log.Shown("a", "one\ntwo", "three").markdown() == "a\n\n---\n\n    one\n    two\n\n---\n\n    three"


def test_ratios_without_bounds_are_numbers_that_json_knows() -> None:
    far = torch.tensor([-200.0, 0.0, 200.0])
    first = asdict(FirstStep.of(far, 0.2, 0.2, rank=0, step=0))
    assert "Infinity" not in json.dumps([first, mismatch.summary(mismatch.of_batch(far)[None])])
    assert first["ratio_max"] > 1e20 and first["logprob_difference_max"] == 200


def test_the_last_step_is_logged_however_seldom_steps_are(tmp_path: Path) -> None:
    trained = small.trainer(small.opened(tmp_path))
    trained.args.logging_steps = 4
    trained.train()
    assert list(small.losses(trained)) == [4, small.STEPS]
    assert numbers(trained)["last_loss"] == small.losses(trained)[small.STEPS]


def test_means_of_the_manifest_are_over_steps_however_seldom_they_are_logged(tmp_path: Path) -> None:
    each = small.trainer(small.opened(tmp_path / "each"))
    each.train()
    seldom = small.trainer(small.opened(tmp_path / "seldom"))
    seldom.args.logging_steps, seldom.args.logging_first_step = 4, True  # as `settings.common` has it
    seldom.train()
    assert list(small.losses(seldom)) == [1, 4, small.STEPS]
    assert small.losses(seldom)[1] == small.losses(each)[1]
    mean = sum(small.losses(each).values()) / small.STEPS
    assert numbers(seldom)["mean_loss"] == pytest.approx(mean, rel=1e-5)
    assert numbers(each)["mean_loss"] == pytest.approx(mean, rel=1e-5)


def test_the_first_batch_since_the_last_log_is_taken_once(tokenizer: Any) -> None:
    samples = Samples(most=1)
    for text in ("yes", "no"):
        input_ids, mask = ids(tokenizer, text)
        samples.saw({"input_ids": input_ids, "attention_mask": mask}, (text,), 1, tokenizer)
    assert [row.completion for row in samples.take(tokenizer)] == ["yes"]
    assert samples.take(tokenizer) == []


def test_all_attempts_of_a_training_are_one_run_of_wandb(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    ws = new_run("logging.wandb.enabled=true")

    def attempt(round: int, main: bool = True) -> str | None:
        monkeypatch.setattr(os, "environ", {})
        train._set_up_wandb(load(ws.root, round, "train"), main)
        assert os.environ["WANDB_MODE"] == "offline" and ("WANDB_RESUME" in os.environ) == main
        return os.environ.get("WANDB_RUN_ID")

    assert attempt(1, main=False) is None
    first = attempt(1)
    assert first is not None and attempt(1) == first != attempt(2)


def test_a_debug_file_is_written_as_batches_come(tokenizer: Any, tmp_path: Path) -> None:
    samples = Samples(debug=tmp_path / "debug.txt")
    input_ids, mask = ids(tokenizer, "yes", "no")
    samples.saw({"input_ids": input_ids, "attention_mask": mask}, ("a", "b"), 3, tokenizer)
    samples.saw({"input_ids": input_ids, "attention_mask": mask}, (), 3, tokenizer)  # live: LiveRewards writes these
    assert (tmp_path / "debug.txt").read_text() == "---- step 3 a\nyes\n---- step 3 b\nno\n"
