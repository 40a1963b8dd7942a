"""Sampling with transformers: slower than vLLM, runs wherever the model does.

Each request has a random generator of its own, and draws one exponential number per vocabulary entry and step, as
vLLM's sampler does: what a request draws does not depend on its batch, and where logits agree both engines sample the
same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hpc_rl.engines.base import BAN_BIAS, Completion, Request, Sampling, banned_ids, decode, end_ids, render
from hpc_rl.engines.loading import load_model, load_processor, pick_device, tokenizer_of

BATCH_SIZE = 32


class _SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token and leaves `generate` no other: all other logits become -inf."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling, bias: torch.Tensor) -> None:
        self._generators = [torch.Generator(bias.device).manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p, self._bias = sampling.temperature, sampling.top_p, bias
        self.tokens: list[torch.Tensor] = []
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float() + self._bias
        if self._temperature > 0:
            logits = _nucleus(logits / self._temperature, self._top_p)
        logprobs = logits.log_softmax(-1)
        if self._temperature > 0:
            noise = torch.empty_like(logits)
            for row, generator in zip(noise, self._generators, strict=True):
                row.exponential_(generator=generator)
            chosen = (logits.softmax(-1) / noise).argmax(-1)
        else:
            chosen = logits.argmax(-1)
        self.tokens.append(chosen)
        self.logprobs.append(logprobs.gather(-1, chosen[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (B, V) of the likeliest tokens that together have probability `top_p` or more; the others' are -inf."""
    if top_p >= 1:
        return logits
    likely, order = logits.softmax(-1).sort(-1, descending=True)
    left_out = likely.cumsum(-1) - likely >= top_p  # those before it are enough already
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)


class TransformersEngine:
    """An engine on a Hugging Face model.

    Parameters
    ----------
    path
        Model folder.
    adapter
        LoRA folder (PEFT) to put on top, or None.
    merge
        Merge the adapter into the weights instead of computing it beside them.
    dtype, attention, min_pixels, max_pixels
        The config's `speaker` section. Without pixel limits it sees no images.
    """

    def __init__(
        self,
        path: str,
        adapter: Path | None = None,
        *,
        merge: bool = False,
        dtype: str = "float32",
        attention: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self._device = pick_device()
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._model: Any = load_model(path, dtype, attention, self._device)
        tokenizer = tokenizer_of(self._processor)
        self._ends = end_ids(path, tokenizer)
        # In place of the model's own generation config, which often asks for a repetition penalty or top_k.
        self._model.generation_config = GenerationConfig(
            eos_token_id=list(self._ends), pad_token_id=tokenizer.pad_token_id
        )
        if adapter is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(self._model, adapter).eval()
            self._model = adapted.merge_and_unload() if merge else adapted
        self._bias = torch.zeros(self._model.config.get_text_config().vocab_size, device=self._device)
        self._bias[list(banned_ids(path, tokenizer))] = BAN_BIAS

    def forget(self) -> None:
        """Nothing is kept between calls."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`."""
        if sampling.json_schema is not None:
            raise ValueError("the transformers engine holds no completion to a schema; engine vllm does")
        completions: list[Completion] = []
        for start in range(0, len(requests), BATCH_SIZE):
            completions += self._generate(requests[start : start + BATCH_SIZE], sampling)
        return completions

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        texts = [render(self._processor, request.prompt) for request in requests]
        images = [image for request in requests for image in request.prompt.images]
        given = {"images": images} if images else {}
        # The chat template has written the special tokens already.
        inputs = self._processor(text=texts, padding=True, return_tensors="pt", add_special_tokens=False, **given)
        inputs = inputs.to(self._device)
        sampler = _SeededSampler([request.seed for request in requests], sampling, self._bias)
        self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = torch.stack(sampler.tokens, 1).tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        return [self._cut(*row) for row in zip(prompts, tokens, logprobs, strict=True)]

    def _cut(self, prompt: list[int], tokens: list[int], logprobs: list[float]) -> Completion:
        """A row up to its own end; the batch goes on until its longest row ends."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        length = len(tokens) if end is None else end + 1
        return Completion(
            tuple(prompt),
            tuple(tokens[:length]),
            tuple(logprobs[:length]),
            decode(tokenizer_of(self._processor), tokens[:length]),
            "length" if end is None else "stop",
        )
