"""What a training's steps cost: seconds, tokens per second, share of what the GPUs could do, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model

from hpc_rl.training.trl_parts import adjusted_mfu, compute_flops_per_token, compute_mfu, get_peak_flops

MASKS = ("prompt_mask", "completion_mask", "attention_mask")
"""Keys of a batch that tell tokens from padding, of rollouts the first two; a packed batch has none, and no padding."""
GIB = 2**30


class Meter:
    """Measures from one logged step to the next; what saving takes is left out."""

    def __init__(self) -> None:
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
        self._rows += len(ids)

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
        weights. It is known on GPUs whose speed TRL knows, for models of dense or mixture-of-experts layers.
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
        mfu = _mfu(trainer, tokens / seconds, round(tokens / max(1, rows)), len(everyone))
        if mfu is not None:
            found["throughput/mfu_percent"] = mfu
        self.begin()
        return found


def _mfu(trainer: Any, tokens_per_s: float, length: int, ranks: int) -> float | None:
    if not torch.cuda.is_available():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    precision = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    peak = get_peak_flops(torch.cuda.get_device_name(), precision)
    if peak is None:
        return None
    return mfu(model.config.get_text_config(), is_peft_model(model), tokens_per_s, length, ranks, peak)


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
