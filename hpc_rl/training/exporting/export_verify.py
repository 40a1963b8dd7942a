"""Whether exported weights are what was trained: loaded as documented, compared, and asked the same question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from hpc_rl.engines.base import BAN_BIAS
from hpc_rl.engines.loading import tokenizer_of

PROBE_TOKENS = 24
MOST_DIVERGENCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Nats between two answers, per token. In float32 the same weights differ by rounding alone, at most by that of TF32
matrices on GPUs. In 16 bits logits around 20 come in steps of 1/8, and weights and a merged adapter were rounded once
more; a forgotten scale, other positions or a head drawn at random are far beyond."""
MOST_SCORE_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.03}
"""Between two scores, for the same reasons; of scores beyond 1 it is a share."""


class BadExport(RuntimeError):
    """Weights that were written but cannot be used; the message says why. They get no manifest."""


@dataclass(frozen=True)
class Probe:
    """A question to a model, and its answer: (1, T, vocabulary) logits, or a (1, 1) score, in float32 on the CPU."""

    question: Mapping[str, torch.Tensor]
    answer: torch.Tensor


def ask(wrapped: Any, model: Any, processor: Any, device: torch.device) -> Probe:
    """Ask a trained model. All ranks must call it: its weights may be spread over them.

    The question is a picture in a chat, of models that see and have a chat template; else tokens of the vocabulary.

    Parameters
    ----------
    wrapped, model
        The model as training runs it, and itself.
    processor
        Its tokenizer, or processor with one.
    """
    question = _question(model, processor)
    return Probe(question, _answer(wrapped, question, device))


def verify_adapter(folder: Path, model: Any, state: Mapping[str, torch.Tensor], probe: Probe, dtype: str) -> Any:
    """Load an adapter as PEFT's documentation says, on its base, and compare; returns what was loaded.

    Parameters
    ----------
    folder
        Of the adapter.
    model, state, probe
        What was trained.
    dtype
        Number type of the base.

    Raises
    ------
    BadExport
        When it is not `state`, or answers otherwise than the trained model did.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    base, _ = _load(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path, model, dtype)
    loaded = PeftModel.from_pretrained(base, str(folder))
    _compare(get_peft_model_state_dict(loaded), state, folder)
    _compare_answers(loaded, probe, dtype, folder)
    return loaded


def verify_full(folder: Path, model: Any, state: Mapping[str, torch.Tensor], probe: Probe, dtype: str) -> None:
    """Load a whole model as transformers' documentation says, and compare.

    Raises
    ------
    BadExport
        When weights are missing in it or too many, it is not `state`, or it answers otherwise than the trained model.
    """
    loaded, report = _load(folder, model, dtype)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise BadExport(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:5]}")
    sees = auto_class(model) is AutoModelForImageTextToText
    (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder, local_files_only=True)
    _compare(loaded.state_dict(), state, folder)
    _compare_answers(loaded, probe, dtype, folder)


def auto_class(model: Any) -> Any:
    """The class of transformers that loads models with the head of `model`, which may have an adapter."""
    model = getattr(model, "get_base_model", lambda: model)()
    config = type(model.config)
    for kind, heads in (
        (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if config in heads and isinstance(model, heads[config]):
            return kind
    return AutoModelForCausalLM


def _load(folder: str | Path, model: Any, dtype: str) -> tuple[Any, Mapping[str, Any]]:
    """A model like `model` from a folder, and what transformers missed in it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # rank 0 is alone here; with ZeRO-3 set, transformers would wait for the others
    kind = auto_class(model)
    head = {"num_labels": model.config.num_labels} if kind is AutoModelForSequenceClassification else {}
    loaded, report = kind.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True, **head
    )
    return loaded, report


@torch.no_grad()
def _answer(model: Any, question: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    model.eval()
    inputs = {name: value.to(device) for name, value in question.items()}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.float().cpu()


def _question(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    if hasattr(processor, "image_processor") and processor.chat_template:
        shown = [{"type": "image", "image": Image.linear_gradient("L").convert("RGB")}, {"type": "text", "text": "?"}]
        chat = [{"role": "user", "content": shown}]
        return dict(processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt"))
    tokenizer = tokenizer_of(processor)
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    words = sorted(set(range(known)) - set(tokenizer.added_tokens_decoder))
    ids = torch.tensor([words[:: max(1, len(words) // PROBE_TOKENS)][:PROBE_TOKENS]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _compare(loaded: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    if loaded.keys() != trained.keys():
        differ = sorted(loaded.keys() ^ trained.keys())
        raise BadExport(f"{folder} holds other tensors than were trained: {', '.join(differ[:5])}")
    for name, tensor in trained.items():
        if not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
            raise BadExport(f"{folder}: {name} is not what was trained")


def _compare_answers(loaded: Any, probe: Probe, dtype: str, folder: Path) -> None:
    found = _answer(loaded, probe.question, torch.device("cpu"))
    if found.shape != probe.answer.shape:
        raise BadExport(f"{folder} answers {tuple(found.shape)}, the trained model {tuple(probe.answer.shape)}")
    if found.dim() == 2:
        differ = float(((found - probe.answer).abs() / probe.answer.abs().clamp(min=1)).max())
        most, of = MOST_SCORE_DIFFERENCE[dtype], "in its score"
    else:
        differ, most, of = divergence(probe.answer, found), MOST_DIVERGENCE[dtype], "nats per token"
    if not differ <= most:  # NaN too
        raise BadExport(
            f"{folder} holds the trained weights, but does not answer as the trained model does: they differ by "
            f"{differ:.3g} {of}, at most {most} is rounding in {dtype}. Is something in its config not the model's?"
        )


def divergence(trained: torch.Tensor, loaded: torch.Tensor) -> float:
    """Kullback-Leibler divergence of next-token distributions, mean over tokens, in nats.

    Tokens that training bans (`models.ban`) count in neither: the ban is no part of what is exported.

    Parameters
    ----------
    trained, loaded
        (1, T, V) logits.
    """
    banned = (trained - loaded < BAN_BIAS / 2).all(dim=1, keepdim=True)
    p, q = (logits.masked_fill(banned, -torch.inf).log_softmax(-1) for logits in (trained, loaded))
    return float((p.exp() * (p - q).masked_fill(banned, 0)).sum(-1).mean())
