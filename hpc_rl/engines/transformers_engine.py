"""Sampling with transformers: slower than vLLM, runs wherever the model does.

A step draws one batch from its beginning to its end: the requests that have waited longest, up to `capacity` that are
sampled alike, whatever prompts and shards they come from. So a sample's batch depends on what was submitted before it,
and the last bits of its logits depend on its batch; where requests come in the same order, batches are the same.

Each request has a random generator of its own, and draws one exponential number per vocabulary entry and step, as
vLLM's sampler does: what a request draws does not depend on its batch, and where logits agree both engines sample the
same tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from hpc_rl.engines.base import (
    BAN_BIAS,
    NO_VARIABLES,
    Completion,
    Prompt,
    Request,
    Sampling,
    banned_ids,
    decode,
    end_ids,
    render,
    too_long,
)
from hpc_rl.engines.in_flight import InFlight, PromptKey
from hpc_rl.engines.loading import load_model, load_processor, pick_device, tokenizer_of
from hpc_rl.engines.stops import Stops

CAPACITY = 32

Inputs = Mapping[str, torch.Tensor]
"""What a processor makes of one prompt: `input_ids` (1, L), others of that shape, and those of its images."""


class _SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token and leaves `generate` no other: all other logits become -inf."""

    def __init__(
        self, seeds: Sequence[int], sampling: Sampling, bias: torch.Tensor, on_token: Callable[[], None]
    ) -> None:
        self._generators = [torch.Generator(bias.device).manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p, self._bias = sampling.temperature, sampling.top_p, bias
        self._on_token = on_token
        self.tokens: list[torch.Tensor] = []
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._on_token()
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


@dataclass(frozen=True)
class _Waiting:
    """A request in the queue; `limit`: its longest completion, in tokens."""

    prompt: PromptKey
    inputs: Inputs
    seed: int
    sampling: Sampling
    limit: int


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
    variables
        Of its chat template (`chat_template_kwargs`).
    max_model_len
        Longest prompt and completion together; None = the model's own limit.
    max_num_seqs
        Completions of one batch; None = 32.
    """

    kind = "transformers"

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
        variables: Mapping[str, Any] = NO_VARIABLES,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
    ) -> None:
        self._device = pick_device()
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._sees = min_pixels is not None
        self._variables = variables
        self._model: Any = load_model(path, dtype, attention, self._device)
        tokenizer = self._tokenizer = copy.deepcopy(tokenizer_of(self._processor))  # prompts are read in other threads
        self._ends = end_ids(path, tokenizer)
        self._pad: int = self._ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # In place of the model's own generation config, which often asks for a repetition penalty or top_k.
        self._model.generation_config = GenerationConfig(eos_token_id=list(self._ends), pad_token_id=self._pad)
        if adapter is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(self._model, adapter).eval()
            self._model = adapted.merge_and_unload() if merge else adapted
        config = self._model.config.get_text_config()
        own_limit: int | None = getattr(config, "max_position_embeddings", None)
        self._max_model_len = min(limit for limit in (own_limit, max_model_len, sys.maxsize) if limit is not None)
        self._bias = torch.zeros(config.vocab_size, device=self._device)
        self._bias[list(banned_ids(path, tokenizer))] = BAN_BIAS
        self._prompts: InFlight[Inputs] = InFlight(self._read)
        self._queue: dict[str, _Waiting] = {}
        self._capacity = max_num_seqs or CAPACITY
        self._on_token: Callable[[], None] = lambda: None

    @property
    def capacity(self) -> int:
        """Rows of a batch."""
        return self._capacity

    @property
    def unfinished(self) -> int:
        """See `Engine.unfinished`."""
        return len(self._queue)

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """See `Engine.expect`: all, since an empty place in a batch stays empty to its end."""
        self._prompts.expect(prompts)
        return len(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """See `Engine.submit`."""
        if key in self._queue:
            raise ValueError(f"{key} is in flight already; each request needs a key of its own")
        if sampling.json_schema is not None:
            raise ValueError("the transformers engine holds no completion to a schema; engine vllm does")
        if sampling.stop and not Stops.can_read(self._tokenizer):
            raise ValueError(
                "the transformers engine finds stops with fast tokenizers only; engine vllm with others too"
            )
        prompt, inputs = self._prompts.take(request.prompt)
        limit = min(sampling.max_tokens, self._max_model_len - inputs["input_ids"].shape[1])
        self._queue[key] = _Waiting(prompt, inputs, request.seed, sampling, limit)

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`: the next batch."""
        if not self._queue:
            return []
        first = next(iter(self._queue.values()))
        alike = (key for key, it in self._queue.items() if (it.sampling, it.limit) == (first.sampling, first.limit))
        keys = list(islice(alike, self._capacity))
        made = self._generate([self._queue[key] for key in keys])
        self.abort(keys)
        return sorted(zip(keys, made, strict=True), key=lambda pair: len(pair[1].token_ids))

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`."""
        for key in keys:
            if key in self._queue:
                self._prompts.give_back(self._queue.pop(key).prompt)

    def tell_progress(self, call: Callable[[], None]) -> None:
        """See `LongSteps.tell_progress`: after each token of a batch."""
        self._on_token = call

    def close(self) -> None:
        """See `Engine.close`."""
        self.abort(list(self._queue))
        self._prompts.close()
        self._model = None

    def _read(self, prompt: Prompt, images: Sequence[Image.Image]) -> Inputs:
        if images and not self._sees:
            raise ValueError("this engine was opened without pixel limits, so it sees no images")
        given = {"images": list(images)} if images else {}
        # The chat template has written the special tokens already.
        text = [render(self._processor, prompt, self._variables)]
        made = self._processor(text=text, return_tensors="pt", add_special_tokens=False, **given)
        inputs: Inputs = dict(made)
        if prompt.keep_tokens is not None:
            inputs = {name: row[:, -prompt.keep_tokens :] for name, row in inputs.items()}
        tokens = inputs["input_ids"].shape[1]
        if tokens >= self._max_model_len:
            raise ValueError(too_long(tokens, self._max_model_len))
        return inputs

    @torch.inference_mode()
    def _generate(self, batch: Sequence[_Waiting]) -> list[Completion]:
        sampling, limit = batch[0].sampling, batch[0].limit
        prompts = [waiting.inputs["input_ids"][0].tolist() for waiting in batch]
        inputs = {name: value.to(self._device) for name, value in self._collate(batch).items()}
        sampler = _SeededSampler([waiting.seed for waiting in batch], sampling, self._bias, self._on_token)
        stops = Stops(self._tokenizer, prompts, sampling.stop, self._ends) if sampling.stop else None
        self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=limit,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([] if stops is None else [stops]),
        )
        tokens = torch.stack(sampler.tokens, 1).tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        return [
            self._cut(row, *of_row, stops) for row, of_row in enumerate(zip(prompts, tokens, logprobs, strict=True))
        ]

    def _collate(self, batch: Sequence[_Waiting]) -> dict[str, torch.Tensor]:
        """One batch of all prompts: what is as long as a prompt is padded on the left, the images are put together."""
        rows = [waiting.inputs for waiting in batch]
        longest = max(row["input_ids"].shape[1] for row in rows)
        made: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            if any(name in row and row[name].shape == row["input_ids"].shape for row in rows):
                pad = self._pad if name == "input_ids" else 0
                parts = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
                parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0), value=pad) for part in parts]
            else:
                parts = [row[name] for row in rows if name in row]
            made[name] = torch.cat(parts)
        return made

    def _cut(
        self, row: int, prompt: list[int], tokens: list[int], logprobs: list[float], stops: Stops | None
    ) -> Completion:
        """A row up to its own end; the batch goes on until its longest row ends."""
        ends = [place + 1 for place, token in enumerate(tokens) if token in self._ends][:1]
        if stops is not None and (stopped := stops.lengths[row]) is not None:
            ends.append(stopped)
        length = min(ends, default=len(tokens))
        return Completion(
            tuple(prompt),
            tuple(tokens[:length]),
            tuple(logprobs[:length]),
            decode(self._tokenizer, tokens[:length]) if stops is None else stops.texts[row],
            "stop" if ends else "length",
        )
