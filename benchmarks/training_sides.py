"""The bare side of benchmarks/training.py: a script with one of TRL's trainers, as its documentation shows it.

    python -m benchmarks.training_sides WORKSPACE sft|dpo|grpo

It reads the rows and the settings of the workspace. Token ids are made already, so TRL tokenises nothing. GRPO would
generate: in place of that it is given the stored samples, as the tensors that its generation returns; rewards are
advantages already. It saves nothing, and reports to nobody but the callback that takes the times.

What it measured is printed as one JSON object: the seconds of each step, and the most GPU memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.training_recipe import FILES, GROUP, TrainingConfig
from hpc_rl.engines.loading import choose_attention, pick_device
from hpc_rl.orchestrate.job import load
from hpc_rl.training.trl_parts import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.training_sides WORKSPACE ALGORITHM`"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("algorithm", choices=list(FILES))
    options = parser.parse_args(argv)
    job = load(options.workspace, 1, options.algorithm)
    (manifest,) = job.inputs(1, "data")
    config = job.config
    assert isinstance(config, TrainingConfig)
    table = Dataset.from_parquet(str(manifest.path(FILES[options.algorithm])))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = MAKE[options.algorithm](config, table, _settings(config, options.algorithm, folder))
        trainer.add_callback(clock)
        trainer.train()
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    seconds = [after - before for before, after in pairwise(clock.times)]
    print(json.dumps({"step_s": seconds, "peak_gpu_gib": gpu}))
    return 0


class Clock(TrainerCallback):  # type: ignore[misc]
    """The time at which each step is logged."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take it."""
        if "loss" in (logs or {}):
            self.times.append(time.time())


def _settings(config: TrainingConfig, algorithm: str, folder: str) -> dict[str, Any]:
    """What all of TRL's configs take, from the section of the algorithm."""
    section, gpu = getattr(config, algorithm), torch.cuda.is_available()
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": section.per_device_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler,
        "warmup_steps": section.warmup_steps,
        "adam_beta1": section.adam_betas[0],
        "adam_beta2": section.adam_betas[1],
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": "adamw_torch_fused" if gpu else "adamw_torch",
        "gradient_checkpointing": section.gradient_checkpointing,
        "bf16": config.model.dtype == "bfloat16",
        "fp16": config.model.dtype == "float16",
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def _model(config: TrainingConfig) -> dict[str, Any]:
    """The model, float32 under autocast like the job's, and its tokenizer."""
    path, attention = str(config.model.path), choose_attention(config.model.attn_implementation, pick_device())
    return {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention),
        "processing_class": AutoTokenizer.from_pretrained(path),
    }


def _sft(config: TrainingConfig, table: Dataset, settings: Row) -> SFTTrainer:
    def joined(row: Row) -> Row:
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    rows = table.map(joined, remove_columns=table.column_names)
    args = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(**_model(config), args=args, train_dataset=rows)


class Dpo(DPOTrainer):  # type: ignore[misc]
    """TRL's, on token ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        names = {
            "prompt_token_ids": "prompt_ids",
            "chosen_token_ids": "chosen_ids",
            "rejected_token_ids": "rejected_ids",
        }
        return dataset.rename_columns(names).remove_columns(["pair_id"])


def _dpo(config: TrainingConfig, table: Dataset, settings: Row) -> DPOTrainer:
    # TRL looks for these columns before it tokenises
    texts = {name: [""] * len(table) for name in ("prompt", "chosen", "rejected")}
    for name, values in texts.items():
        table = table.add_column(name, values)
    args = DPOConfig(**settings, beta=config.dpo.beta, max_length=None, precompute_ref_log_probs=True)
    return Dpo(**_model(config), args=args, train_dataset=table)


class Grpo(GRPOTrainer):  # type: ignore[misc]
    """TRL's, with samples that were drawn before."""

    def _generate_and_score_completions(self, inputs: list[Row]) -> Row:
        """What TRL returns when it has generated."""

        def tensor(name: str) -> torch.Tensor:
            # TRL repeats a prompt as often as it is sampled
            samples = [row["samples"][place % GROUP] for place, row in enumerate(inputs)]
            return torch.tensor([sample[name] for sample in samples], device=self.accelerator.device)

        prompts, completions = tensor("prompt_token_ids"), tensor("token_ids")
        return {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions,
            "completion_mask": torch.ones_like(completions),
            "old_per_token_logps": tensor("logprobs"),
            "advantages": 2 * tensor("reward") - 1,
            "num_items_in_batch": torch.tensor(completions.numel(), device=completions.device),
        }


def _grpo(config: TrainingConfig, table: Dataset, settings: Row) -> GRPOTrainer:
    samples = list(table)
    groups = [samples[first : first + GROUP] for first in range(0, len(samples), GROUP)]
    rows = Dataset.from_list([{"prompt": "", "samples": group} for group in groups])
    args = GRPOConfig(
        **settings, num_generations=GROUP, max_completion_length=config.data.completion_tokens, beta=0.0,
        epsilon=config.grpo.epsilon, loss_type=config.grpo.loss_type,
    )  # fmt: skip
    return Grpo(**_model(config), args=args, train_dataset=rows, reward_funcs=[lambda **_: []])


MAKE = {"sft": _sft, "dpo": _dpo, "grpo": _grpo}


if __name__ == "__main__":
    raise SystemExit(main())
