"""Sampling with vLLM, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpc_rl.engines.base import BAN_BIAS, Completion, Prompt, Request, Sampling, banned_ids, decode, render
from hpc_rl.engines.loading import load_processor, tokenizer_of
from hpc_rl.engines.vllm_start import start_vllm

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM takes as `max_lora_rank`."""


class VllmEngine:
    """An engine on vLLM.

    Parameters
    ----------
    path
        Model folder.
    adapter
        LoRA folder (PEFT), or None.
    adapter_name
        A name that no other adapter has in this process or will have: vLLM's prefix cache goes by it.
    adapter_rank
        The adapter's LoRA rank.
    dtype, min_pixels, max_pixels
        The config's `speaker` section. Without pixel limits it sees no images.
    max_model_len
        Longest prompt and completion together; None = the model's own limit.
    gpu_memory_utilization
        Share of each GPU's memory to take.
    batch_invariant
        Ask for the mode in which a sample does not depend on its batch, where the hardware has it.
    images_per_prompt
        Most images in one prompt.
    """

    def __init__(
        self,
        path: str,
        adapter: Path | None = None,
        *,
        adapter_name: str = "",
        adapter_rank: int = 0,
        dtype: str = "float32",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.8,
        batch_invariant: bool = True,
        images_per_prompt: int = 1,
    ) -> None:
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._bias = {token: BAN_BIAS for token in banned_ids(path, tokenizer_of(self._processor))}
        options: dict[str, Any] = {}
        if min_pixels is not None:
            options |= {
                "limit_mm_per_prompt": {"image": images_per_prompt, "video": 0},
                "mm_processor_kwargs": {"min_pixels": min_pixels, "max_pixels": max_pixels},
            }
        if adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": next(r for r in LORA_RANKS if r >= adapter_rank)}
        self._llm = start_vllm(
            path,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            batch_invariant=batch_invariant,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            # On CPUs a prompt that is read in two steps stops the engine if it has a seed ("does not use offset").
            enable_chunked_prefill=torch.cuda.is_available(),
            # Free whitespace costs tokens, and some models never stop it.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            **options,
        )
        from vllm.lora.request import LoRARequest  # only now: vLLM reads its environment when it is imported

        self._adapter = None if adapter is None else LoRARequest(adapter_name, 1, str(adapter))

    def forget(self) -> None:
        """See `Engine.forget`: prefix, image and encoder caches."""
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import StructuredOutputsParams

        form = None if sampling.json_schema is None else StructuredOutputsParams(json=sampling.json_schema)
        options = [
            SamplingParams(
                n=1,  # not G: the seeds of a group would be n apart, and a sample would depend on its place
                seed=request.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
                top_k=0,
                max_tokens=sampling.max_tokens,
                logprobs=0,
                logit_bias=self._bias,
                detokenize=False,
                structured_outputs=form,
            )
            for request in requests
        ]
        prompts = [self._prompt(request.prompt) for request in requests]
        try:
            outputs = self._llm.generate(prompts, options, use_tqdm=False, lora_request=self._adapter)
        except VLLMValidationError as error:  # the schema, where there is one
            raise ValueError(str(error)) from error
        return [self._completion(output) for output in outputs]

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        text = render(self._processor, prompt)
        if prompt.images:
            return {"prompt": text, "multi_modal_data": {"image": list(prompt.images)}}
        # The chat template has written the special tokens already; from a text vLLM would write them once more.
        return {"prompt_token_ids": tokenizer_of(self._processor)(text, add_special_tokens=False)["input_ids"]}

    def _completion(self, output: Any) -> Completion:
        (sampled,) = output.outputs
        if sampled.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave a completion up: {sampled.finish_reason}")
        tokens = tuple(sampled.token_ids)
        return Completion(
            tuple(output.prompt_token_ids),
            tokens,
            tuple(place[token].logprob for token, place in zip(tokens, sampled.logprobs, strict=True)),
            decode(tokenizer_of(self._processor), tokens),
            sampled.finish_reason,
        )
