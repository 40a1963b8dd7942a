"""What a training's steps cost: seconds, tokens per second, share of what the GPUs could do, memory."""

from __future__ import annotations

import copy
import logging
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model

from hpc_rl.training.models import SCORE
from hpc_rl.training.trl_parts import adjusted_mfu, compute_flops_per_token, compute_mfu, get_peak_flops

log = logging.getLogger(__name__)

MASKS = ("prompt_mask", "completion_mask", "attention_mask")
"""Keys of a batch that tell tokens from padding, of rollouts the first two; a packed batch has none, and no padding."""
GIB = 2**30


class Meter:
    """Measures from one logged step to the next; what saving takes is left out."""

    def __init__(self) -> None:
        self._no_mfu = False
        self.begin()

    def begin(self) -> None:
        """Begin a new stretch."""
        self._began, self._paused_s, self._steps = time.monotonic(), 0.0, 0
        self._tokens: Any = 0
        self._rows = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count what goes through the model in one pass, prompts too."""
        ids = batch["prompt_ids" if "prompt_ids" in batch else "input_ids"]
        masks = MASKS[:2] if "prompt_ids" in batch else MASKS[2:]
        self._tokens = self._tokens + sum(batch[name].sum() if name in batch else ids.numel() for name in masks)
        # texts of a packed row do not see each other
        self._rows += len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(ids)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens within."""
        began = time.monotonic()
        yield
        self._paused_s += time.monotonic() - began

    def measured(self, trainer: Any, steps: int) -> dict[str, float]:
        """The numbers of the last `steps` steps on all ranks, which must all call it; a new stretch begins.

        Tokens per second are those of all ranks, padding left out. The MFU (in percent) is TRL's, with causal attention
        counted by half; of a model that sees without its vision part, and with LoRA without gradients of the frozen
        weights. It is known on GPUs whose speed TRL knows, for models that `mfu_or_none` knows, and not where two are
        trained.
        """
        seconds = time.monotonic() - self._began - self._paused_s
        gpu = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        ours = torch.tensor([float(self._tokens), self._rows, seconds, gpu, host], device=trainer.accelerator.device)
        everyone = trainer.accelerator.gather(ours[None]).cpu()
        tokens, rows = everyone[:, 0].sum().item(), everyone[:, 1].sum().item()
        seconds, gpu, host = everyone[:, 2:].amax(dim=0).tolist()
        found = {
            "throughput/step_s": seconds / max(1, steps),
            "throughput/tokens_per_s": tokens / seconds,
            "memory/host_peak_gib": host,
        }
        if gpu:
            found["memory/gpu_peak_gib"] = gpu
        if torch.cuda.is_available() and not self._no_mfu:
            device = torch.cuda.get_device_name()
            mfu = _mfu(trainer, tokens / seconds, round(tokens / max(1, rows)), len(everyone), device)
            if mfu is not None:
                found["throughput/mfu_percent"] = mfu
            else:
                self._no_mfu = True
                log.info("no MFU is logged: it is not known for this model on %s", device)
        self.begin()
        return found


def _mfu(trainer: Any, tokens_per_s: float, length: int, ranks: int, device: str) -> float | None:
    precision = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    peak = get_peak_flops(device, precision)
    if peak is None or getattr(trainer, "second", None) is not None:  # a second model's work is not counted
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config()
    if any(SCORE in name.split(".") for name, _ in model.named_modules()):
        config = copy.copy(config)
        config.vocab_size = 1  # one score in the place of logits; the embedding is not counted in any case
    return mfu_or_none(config, is_peft_model(model), tokens_per_s, length, ranks, peak)


def mfu_or_none(
    config: Any, lora: bool, tokens_per_s: float, length: int, ranks: int, peak_flops: float
) -> float | None:
    """`mfu`, or None of a model whose layers TRL cannot count: a number to look at must not end a training.

    TRL reads the shapes of Llama's layers, and of experts as Qwen3-MoE's config names them. Other names raise; layers
    that have other matrices under the same names would be counted wrong.
    """
    if _has_other_layers(config):
        return None
    try:
        return mfu(config, lora, tokens_per_s, length, ranks, peak_flops)
    except (AttributeError, TypeError, ZeroDivisionError):
        return None


def _has_other_layers(config: Any) -> bool:
    """Experts that are always asked, or that TRL does not see; low-rank or linear attention."""
    own = {name: value for name, value in config.to_dict().items() if value}
    experts = [name for name in own if "expert" in name and not name.startswith("output_")]
    if any("shared" in name for name in experts) or (experts and "num_experts_per_tok" not in own):
        return True
    return "kv_lora_rank" in own or "linear_attention" in (own.get("layer_types") or ())


def mfu(config: Any, lora: bool, tokens_per_s: float, length: int, ranks: int, peak_flops: float) -> float:
    """Share of `ranks` × `peak_flops` that training uses, in percent.

    Parameters
    ----------
    config
        Of a language model.
    length
        Mean length of a row in tokens, which attention depends on.
    """
    whole = compute_mfu(compute_flops_per_token(config, length), tokens_per_s, ranks, peak_flops)
    causal: float = adjusted_mfu(whole, config, length)
    return causal * (2 / 3 if lora else 1)
