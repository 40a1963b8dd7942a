"""The bare side of benchmarks/sampling.py: one call of `vllm.LLM.generate` over all requests, texts in and texts out.

    python -m benchmarks.sampling_sides MODEL REQUESTS --max-tokens 48 [--min-pixels 784 --max-pixels 12544] …

REQUESTS has a JSON object a line: `messages` as chat templates take them, `images` (paths, in order), `seed`. The
process, the arguments of `vllm.LLM` and the sampling parameters are those of our engine, but that vLLM keeps its own
cache of processed pictures. Before the clock runs, prompts go through the chat template and pictures are decoded. While
it runs, vLLM tokenises the prompts and samples, and the completions become texts in one call. What it measured is
printed as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.sampling_sides MODEL REQUESTS`"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("requests", type=Path)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--min-pixels", type=int)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.8)
    parser.add_argument("--cpu-kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--token-ids", type=Path, help="write the sampled token ids here, a JSON list a line")
    options = parser.parse_args(argv)
    lines = [json.loads(line) for line in options.requests.read_text().splitlines()]
    found, token_ids = bare(options, lines)
    if options.token_ids:
        options.token_ids.write_text("".join(f"{json.dumps(ids)}\n" for ids in token_ids))
    print(json.dumps(found))
    return 0


def bare(options: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[list[int]]]:
    """What it took, in seconds and tokens, and the sampled token ids."""
    began = time.monotonic()
    from hpc_rl.engines.loading import load_processor, tokenizer_of
    from hpc_rl.engines.vllm_engine import sampling_options
    from hpc_rl.engines.vllm_start import import_vllm, start_vllm

    import_vllm(batch_invariant=True)
    started = time.monotonic()
    processor = load_processor(options.model, options.min_pixels, options.max_pixels)
    llm = start_vllm(
        options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        batch_invariant=True,
        max_num_seqs=options.max_num_seqs,
        cpu_kv_cache_gib=options.cpu_kv_cache_gib,
        **sampling_options(options.min_pixels, options.max_pixels),
    )
    ready = time.monotonic()
    params = _params(options, tokenizer_of(processor), [line["seed"] for line in lines])
    prompts = _prompts(processor, lines)
    prepared = time.monotonic()
    alone = {"add_special_tokens": False}  # the chat template has written the special tokens
    outputs = llm.generate(prompts, params, use_tqdm=False, tokenization_kwargs=alone)
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    texts = tokenizer_of(processor).batch_decode(token_ids, skip_special_tokens=True)
    done = time.monotonic()
    assert len(texts) == len(lines)
    tokens = sum(map(len, token_ids))
    return {
        "samples": len(outputs),
        "tokens": tokens,
        "tokens_per_s": round(tokens / (done - prepared), 1),
        "importing_s": round(started - began, 3),
        "starting_s": round(ready - started, 3),
        "preparing_s": round(prepared - ready, 3),
        "generating_s": round(done - prepared, 3),
    }, token_ids


def _params(options: argparse.Namespace, tokenizer: Any, seeds: Sequence[int]) -> list[Any]:
    from vllm import SamplingParams

    from hpc_rl.engines.base import BAN_BIAS, banned_ids

    bias = {token: BAN_BIAS for token in banned_ids(options.model, tokenizer)}
    alike = {"temperature": options.temperature, "max_tokens": options.max_tokens, "logit_bias": bias}
    alike |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
    return [SamplingParams(seed=seed, **alike) for seed in seeds]


def _prompts(processor: Any, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from hpc_rl.data.images import load_image
    from hpc_rl.engines.base import Prompt, render

    paths = dict.fromkeys(path for line in lines for path in line["images"])
    pictures = {path: load_image(Path(path)) for path in paths}
    made = []
    for line in lines:
        given: dict[str, Any] = {"prompt": render(processor, Prompt(tuple(line["messages"])))}
        if line["images"]:
            given["multi_modal_data"] = {"image": [pictures[path] for path in line["images"]]}
        made.append(given)
    return made


if __name__ == "__main__":
    raise SystemExit(main())
