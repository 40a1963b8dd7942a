"""Run by test_export_vllm.py in a process of its own: load exported folders in vLLM, write what they answer as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(base: str, adapter: str, merged: str, reward: str, question: str, out: str) -> None:
    """Log-probabilities of the question's tokens by the adapter and the merged model, and its score."""
    from hpc_rl.engines.reward_model import VllmJudge
    from hpc_rl.engines.vllm_start import import_vllm, start_vllm

    import_vllm()
    from vllm.lora.request import LoRARequest

    ids = json.loads(question)
    limits: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "gpu_memory_utilization": 0.5}
    found = {
        "adapter": logprobs(
            start_vllm(base, **limits, enable_lora=True, max_lora_rank=8),
            ids,
            LoRARequest("trained", 1, adapter),
        ),
        "merged": logprobs(start_vllm(merged, **limits), ids),
        "score": VllmJudge(reward, max_model_len=64).logits([ids]),
    }
    Path(out).write_text(json.dumps(found))


def logprobs(llm: Any, ids: list[int], adapter: Any = None) -> list[float]:
    """Of each token but the first, given those before it."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False, lora_request=adapter)
    return [each[token].logprob for each, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
