"""GRPO and RLOO teach a small model what it does wrong: sums in which it forgets the carry."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.training.on_policy import open_, train
from tools import tiny_sums

STEPS = 200


@pytest.mark.parametrize(
    ("algorithm", "seed"),
    [("grpo", 0), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("grpo", 1), ("grpo", 2), ("rloo", 0)))],
)
def test_rewards_lift_a_model_from_one_in_ten_to_eight_in_ten(
    forgetful: Path, tmp_path: Path, algorithm: str, seed: int
) -> None:
    options = (
        "rollouts=live", f"live_max_steps={STEPS}", "learning_rate=4e-4", "per_device_batch_size=128", "passes=1",
        "lr_scheduler=linear", "weight_decay=0", "adam_betas=[0.9, 0.999]", "save_steps=1000",
    )  # fmt: skip
    sampling = ("sample.prompts_per_round=2000", "sample.samples_per_prompt=8", "logging.log_every_steps=20")
    section = [f"algorithm={algorithm}", f"run.seed={seed}", *(f"{algorithm}.{one}" for one in options)]
    ws, tested = open_(tmp_path, forgetful, *section, *sampling), tiny_sums.sums()[1]
    before = tiny_sums.accuracy(AutoModelForCausalLM.from_pretrained(forgetful), tested)
    train(ws)
    after = tiny_sums.accuracy(AutoModelForCausalLM.from_pretrained(ws.checkpoint_dir("model", 1)), tested)
    assert before < 0.25 and after > 0.8
