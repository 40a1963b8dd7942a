"""A chat model of some 60 000 parameters, with random weights and a chat template: seconds to make and to load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tools.tiny_model import HEAD, build_tokenizer

POSITIONS = 512
CORPUS = ["Is 2 + 3 = 5? Answer yes or no.", '{"answer": "yes", "answer": "no"} system user assistant']


def write(folder: Path, seed: int = 0) -> Path:
    """Write a Hugging Face folder; the folder."""
    tokenizer = build_tokenizer(CORPUS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=2 * HEAD,
        intermediate_size=4 * HEAD,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.08,  # at this width the usual 0.02 makes all tokens alike
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
