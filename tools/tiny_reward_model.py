"""A reward model of some 60 000 parameters, with random weights and a chat template: seconds to make and to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Qwen2Config

from tools.tiny_model import HEAD, build_tokenizer

POSITIONS = 256
CORPUS = ["Please reason step by step, and check your final answer within \\boxed{}.", "What is 2 + 3? system user"]


def build(seed: int = 0, outputs: int = 1) -> tuple[Any, Any]:
    """A new model and its tokenizer."""
    tokenizer = build_tokenizer(CORPUS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=2 * HEAD,
        intermediate_size=4 * HEAD,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.05,  # at this width the usual 0.02 makes all scores alike
        pad_token_id=tokenizer.pad_token_id,
        num_labels=outputs,
    )
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), tokenizer


def write(folder: Path, seed: int = 0, outputs: int = 1) -> Path:
    """Write a Hugging Face folder; the folder."""
    model, tokenizer = build(seed, outputs)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
