"""Loading models and processors the same way in every phase: number type, attention, pixel limits, device (L19)."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as logging_of_transformers

log = logging.getLogger(__name__)


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message says what is missing in it."""


def pick_device() -> torch.device:
    """The first GPU that this process may see, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def choose_attention(name: str, device: torch.device) -> str:
    """Attention code for transformers: `auto` is flash_attention_2 where it is installed, on a GPU, else sdpa."""
    if name != "auto":
        return name
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    chosen = "flash_attention_2" if flash else "sdpa"
    log.info("attention: %s%s", chosen, "" if flash else " (flash_attn is not installed, or there is no GPU)")
    return chosen


def load_processor(path: str | Path, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """What turns prompts into tokens, padded on the left: tokenizer and image processor with a run's pixel limits.

    Without pixel limits it is the tokenizer alone, for models that see no images.
    """
    if not (Path(path) / "config.json").is_file():
        raise ModelFolderError(f"{path} is no model folder: it has no config.json")
    if min_pixels is None and max_pixels is None:
        return AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True)
    return AutoProcessor.from_pretrained(
        path, min_pixels=min_pixels, max_pixels=max_pixels, padding_side="left", local_files_only=True
    )


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer in a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def check_variables(processor: Any, variables: Mapping[str, Any]) -> None:
    """Refuse variables (`chat_template_kwargs`) that a chat template does not read: they would change nothing.

    Raises
    ------
    ModelFolderError
        For the first of them; templates are programs, and the name is looked for as a word in them.
    """
    tokenizer = tokenizer_of(processor)
    template = str(processor.chat_template or tokenizer.chat_template)
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ModelFolderError(
                f"the chat template of {tokenizer.name_or_path} reads no variable {name!r}: correct the name in "
                "chat_template_kwargs, or remove it"
            )


def load_model(path: str | Path, dtype: str, attention: str, device: torch.device) -> PreTrainedModel:
    """A language model from a folder, with its vision tower where it has one, on a device, ready for inference."""
    logging_of_transformers.disable_progress_bar()  # in a job's log a bar is thousands of lines
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=choose_attention(attention, device),
        local_files_only=True,
    )
    return model.to(device).eval()


def control_tokens(processor: Any) -> tuple[str, ...]:
    """Texts that a tokenizer, or a processor's, takes for control tokens, also where they are a user's words."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    return tuple(sorted({token.content for token in added if token.special}))
