"""A Qwen2-VL small enough for a laptop, with a tokenizer that `AutoTokenizer` reads back unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SIDE = 56  # of a picture, in pixels
PATCH = 14
IMAGE_TOKENS = (SIDE // PATCH // 2) ** 2  # after the 2 × 2 merge
HEAD = 32  # vLLM's CPU attention knows no smaller head than 32

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_SPECIAL += ["<|video_pad|>"]
_TAGS = ["<thinking>", "</thinking>", "<coarse>", "</coarse>", "<detailed>", "</detailed>"]
_CHAT = (
    "{% set thoughts = '' if enable_thinking | default(true) else '<think></think>' %}"
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + (thoughts if m['role'] == 'assistant' else '')}}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' + thoughts}}{% endif %}"
)


def build(corpus: list[str], *, seed: int, hidden: int = 96, layers: int = 4, vision: int = 64) -> tuple[Any, Any]:
    """A new model with random weights, and its processor.

    Parameters
    ----------
    corpus : list of str
        Texts that the vocabulary is made from; each word that should be one token must be frequent in it.
    seed : int
        Seed of the weights.
    hidden, layers, vision : int
        Width and depth of the language model, width of the vision tower.
    """
    tokenizer = build_tokenizer(corpus)
    token = tokenizer.convert_tokens_to_ids
    spread = 0.08  # initializer_range: at this width the usual 0.02 starts too flat to learn in minutes
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers":
        layers, "num_attention_heads": hidden // HEAD, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True, "initializer_range": spread, "rope_parameters": {"rope_type": "default",
        "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    tower = {
        "depth": 2, "embed_dim": vision, "hidden_size": hidden, "num_heads": vision // HEAD, "mlp_ratio": 2,
        "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        "initializer_range": spread,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = text["eos_token_id"]
    model.generation_config.pad_token_id = text["pad_token_id"]
    limits = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 4 * SIDE**2}
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": limits}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=_CHAT,
    )
    return model, processor


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A chat tokenizer whose vocabulary is made from `corpus`."""
    # Byte-level BPE split by Qwen2's own expression: AutoTokenizer rebuilds the tokenizer of `model_type: qwen2_vl`
    # from vocabulary and merges with that expression, whatever the folder's tokenizer.json says.
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus * 3, trainer)
    bpe.add_tokens(_TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[_SPECIAL[1], *_SPECIAL[3:]],
        chat_template=_CHAT,
        model_max_length=2048,
        padding_side="left",
    )


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write a Hugging Face folder with float16 weights (half the size; readers load them as float32)."""
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    processor.save_pretrained(folder)


def pixels(processor: Any, images: list[Any]) -> torch.Tensor:
    """Patches of pictures of SIDE × SIDE, shape (N, patches, values), to compute once and use often."""
    parts = [
        processor.image_processor(images=images[i : i + 256], return_tensors="pt")["pixel_values"]
        for i in range(0, len(images), 256)
    ]
    return torch.cat(parts).view(len(images), (SIDE // PATCH) ** 2, -1)


def prompt(processor: Any, text: str) -> str:
    """The chat prompt of one picture and a text."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return chat.replace(processor.image_token, processor.image_token * IMAGE_TOKENS)


def encode(processor: Any, patches: torch.Tensor, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """Model inputs for prompts followed by answers, padded on the left.

    Parameters
    ----------
    patches : tensor (B, patches, values)
        From `pixels`.
    prompts, answers : B lists of token ids
        Answers may be empty.
    """
    pad = processor.tokenizer.pad_token_id
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rows = [before + after for before, after in zip(prompts, answers, strict=True)]
    ids = left_padded(rows, pad)
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * len(rows))
    return {
        "input_ids": ids,
        "attention_mask": left_padded([[1] * len(row) for row in rows], 0),
        "pixel_values": patches.reshape(-1, patches.shape[-1]),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == image).int(),
    }


def left_padded(rows: Sequence[Sequence[float]], value: int) -> torch.Tensor:
    """Rows as one (B, longest) tensor, padded on the left."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[value] * (longest - len(row)) + [*row] for row in rows])
