"""Sampling with vLLM, in this process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hpc_rl.engines.base import (
    BAN_BIAS,
    NO_VARIABLES,
    Completion,
    EngineFailed,
    Prompt,
    Request,
    Sampling,
    banned_ids,
    decode,
    render,
    too_long,
)
from hpc_rl.engines.in_flight import InFlight, PromptKey
from hpc_rl.engines.loading import load_processor, tokenizer_of
from hpc_rl.engines.vllm_start import start_vllm

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM takes as `max_lora_rank`."""


@dataclass(frozen=True)
class _Ready:
    """A prompt as vLLM's scheduler takes it, for any number of requests."""

    rendered: Any
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Flight:
    """A request that vLLM has."""

    name: str
    prompt: PromptKey
    ready: _Ready
    sampling: Sampling


class VllmEngine:
    """An engine on vLLM: requests join the running batch token by token, and leave it as they finish.

    A step costs what a step of `vllm.LLM.generate` costs; a request costs less: what its group shares is made once
    (`InFlight`), its parameters are copied from those of the request before.

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
    variables
        Of its chat template (`chat_template_kwargs`).
    max_model_len
        Longest prompt and completion together; None = the model's own limit.
    gpu_memory_utilization
        Share of each GPU's memory to take.
    batch_invariant
        Ask for the mode in which a sample does not depend on its batch, where the hardware has it.
    images_per_prompt
        Most images in one prompt.
    max_num_seqs, tensor_parallel_size, load_strategy, compile_cache, cpu_kv_cache_gib
        See `start_vllm`; None = its default.
    """

    kind = "vllm"

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
        variables: Mapping[str, Any] = NO_VARIABLES,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.8,
        batch_invariant: bool = True,
        images_per_prompt: int = 1,
        max_num_seqs: int | None = None,
        tensor_parallel_size: int | None = None,
        load_strategy: str | None = None,
        compile_cache: Path | None = None,
        cpu_kv_cache_gib: float | None = None,
    ) -> None:
        self._processor = load_processor(path, min_pixels, max_pixels)
        self._tokenizer = copy.deepcopy(tokenizer_of(self._processor))  # prompts are read in other threads
        self._sees = min_pixels is not None
        self._variables = variables
        self._bias = {token: BAN_BIAS for token in banned_ids(path, self._tokenizer)}
        options = sampling_options(min_pixels, max_pixels, images_per_prompt)
        if self._sees:  # processed images are kept by `InFlight`, as long as they are needed and no longer
            options["mm_processor_cache_gb"] = 0
        if adapter is not None:
            if adapter_rank > LORA_RANKS[-1]:
                raise ValueError(
                    f"the adapter has rank {adapter_rank}, and vLLM takes {LORA_RANKS[-1]} at most: set "
                    "sample.merge_adapter, or train with a smaller lora.r"
                )
            options |= {"enable_lora": True, "max_lora_rank": next(r for r in LORA_RANKS if r >= adapter_rank)}
        self._llm = start_vllm(
            path,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            batch_invariant=batch_invariant,
            max_num_seqs=max_num_seqs,
            tensor_parallel_size=tensor_parallel_size,
            load_strategy=load_strategy,
            compile_cache=compile_cache,
            cpu_kv_cache_gib=cpu_kv_cache_gib,
            **options,
        )
        from vllm.lora.request import LoRARequest  # only now: vLLM reads its environment when it is imported

        self._engine = self._llm.llm_engine
        self._max_model_len: int = self._engine.model_config.max_model_len
        self._adapter = None if adapter is None else LoRARequest(adapter_name, lora_id(adapter_name), str(adapter))
        self._prompts: InFlight[_Ready] = InFlight(self._read)
        self._flights: dict[str, _Flight] = {}
        self._last_params: tuple[Sampling, Any] | None = None

    @property
    def capacity(self) -> int:
        """vLLM's max_num_seqs."""
        return int(self._engine.vllm_config.scheduler_config.max_num_seqs)

    @property
    def unfinished(self) -> int:
        """See `Engine.unfinished`."""
        return len(self._flights)

    def expect(self, prompts: Sequence[Prompt]) -> int:
        """See `Engine.expect`: those that are read."""
        return self._prompts.expect(prompts)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """See `Engine.submit`."""
        from vllm.exceptions import VLLMValidationError

        if key in self._flights:
            raise ValueError(f"{key} is in flight already; each request needs a key of its own")
        prompt, ready = self._prompts.take(request.prompt)
        try:
            params = self._params(sampling, request.seed)
            name = self._engine.add_request(key, ready.rendered, params, lora_request=self._adapter)
        except BaseException as error:
            self._prompts.give_back(prompt)
            if isinstance(error, VLLMValidationError):  # the schema, where there is one
                raise ValueError(str(error)) from error
            raise
        self._flights[key] = _Flight(name, prompt, ready, sampling)

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`: one token for each request in the batch."""
        if not self._flights:
            return []
        finished = []
        for output in self._engine.step():
            flight = self._flights.pop(output.request_id)
            self._prompts.give_back(flight.prompt)
            finished.append((output.request_id, self._completion(output, flight)))
        if self._flights and not self._engine.has_unfinished_requests():
            raise EngineFailed(f"vLLM has lost {len(self._flights)} requests, {next(iter(self._flights))} among them")
        return finished

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`."""
        flights = [self._flights.pop(key) for key in keys if key in self._flights]
        for flight in flights:
            self._prompts.give_back(flight.prompt)
        if flights:
            self._engine.abort_request([flight.name for flight in flights], internal=True)

    def close(self) -> None:
        """See `Engine.close`: ends vLLM's worker processes, where there are some."""
        self.abort(list(self._flights))
        self._prompts.close()
        self._engine.engine_core.shutdown()

    def _read(self, prompt: Prompt, images: Sequence[Image.Image]) -> _Ready:
        tokenizer = tokenizer_of(self._processor)
        # The chat template has written the special tokens already; from a text vLLM would write them once more.
        token_ids = tokenizer(render(self._processor, prompt, self._variables), add_special_tokens=False)["input_ids"]
        if prompt.keep_tokens is not None:
            token_ids = token_ids[-prompt.keep_tokens :]
        self._check_length(len(token_ids))
        given: dict[str, Any] = {"prompt_token_ids": token_ids}
        if images:
            if not self._sees:
                raise ValueError("this engine was opened without pixel limits, so it sees no images")
            given["multi_modal_data"] = {"image": images}
        (rendered,) = self._engine.renderer.render_cmpl([given])
        self._check_length(len(rendered["prompt_token_ids"]))  # now with all of the images' tokens
        return _Ready(rendered, tuple(rendered["prompt_token_ids"]))

    def _check_length(self, tokens: int) -> None:
        if tokens >= self._max_model_len:
            raise ValueError(too_long(tokens, self._max_model_len))

    def _params(self, sampling: Sampling, seed: int) -> Any:
        if self._last_params is None or self._last_params[0] != sampling:
            self._last_params = sampling, self._new_params(sampling)
        params = copy.copy(self._last_params[1])
        params.seed = seed
        return params

    def _new_params(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        form = None if sampling.json_schema is None else StructuredOutputsParams(json=sampling.json_schema)
        return SamplingParams(
            n=1,  # not G: the seeds of a group would be n apart, and a sample would depend on its place
            seed=0,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            top_k=0,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            logit_bias=self._bias,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            structured_outputs=form,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # each request has a shallow copy to itself; a deep one takes longer than a token
        )

    def _completion(self, output: Any, flight: _Flight) -> Completion:
        (sampled,) = output.outputs
        if sampled.finish_reason not in ("stop", "length"):
            raise EngineFailed(f"vLLM gave the request {output.request_id} up: {sampled.finish_reason}")
        tokens = tuple(sampled.token_ids)
        assert len(tokens) == len(sampled.logprobs.logprobs)  # no others than the sampled ones were asked for
        return Completion(
            flight.ready.token_ids,
            tokens,
            tuple(sampled.logprobs.logprobs),
            sampled.text if flight.sampling.stop else decode(self._tokenizer, tokens),
            sampled.finish_reason,
        )


def sampling_options(min_pixels: int | None, max_pixels: int | None, images_per_prompt: int = 1) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that samples for training need, whatever the model; pixel limits for one that sees."""
    options: dict[str, Any] = {
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "enable_prefix_caching": True,  # a group's prompt is computed once, also where its requests come far apart
        # On CPUs a prompt that is read in two steps stops the engine if it has a seed ("does not use offset").
        "enable_chunked_prefill": torch.cuda.is_available(),
        # Free whitespace costs tokens, and some models never stop it.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if min_pixels is not None:
        options["limit_mm_per_prompt"] = {"image": images_per_prompt, "video": 0}
        options["mm_processor_kwargs"] = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return options


def lora_id(name: str) -> int:
    """The number by which vLLM's workers know an adapter, as much its own as its name."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**31 - 1)
