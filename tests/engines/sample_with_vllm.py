"""Run by test_vllm_engine.py in a process of its own: sample with vLLM, write what came out as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from engines.conftest import PIXELS, requests
from hpc_rl.engines.base import Sampling, generate
from hpc_rl.engines.vllm_engine import VllmEngine


def main(speaker: str, adapter: str, out: str) -> None:
    found = {}
    engine = VllmEngine(speaker, max_model_len=256, **PIXELS)
    found["plain"] = generate(engine, requests(), Sampling(1.0, 12))
    found["cool"] = generate(engine, requests(), Sampling(0.6, 12))
    found["greedy"] = generate(engine, requests(), Sampling(0.0, 12))
    found["hot"] = generate(engine, requests(samples=16), Sampling(2.0, 40))
    found["many"] = generate(engine, requests(samples=100), Sampling(1.0, 2))  # prompts beyond what one step reads
    found["after others"] = generate(engine, requests(), Sampling(1.0, 12))
    found["alone"] = [generate(engine, [request], Sampling(1.0, 12))[0] for request in requests()]
    adapted = VllmEngine(speaker, Path(adapter), adapter_name="speaker-1", adapter_rank=4, max_model_len=256, **PIXELS)
    found["adapter"] = generate(adapted, requests(), Sampling(1.0, 12))
    Path(out).write_text(json.dumps({name: [asdict(c) for c in cs] for name, cs in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
