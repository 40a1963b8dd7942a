"""Run by test_vllm_engine.py in a process of its own: sample with vLLM, write what came out as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.conftest import NO_THOUGHTS, PIXELS, TEXT, by_path, pictures, requests, words_of
from hpc_rl.engines.base import Completion, EngineFailed, Prompt, Request, Sampling, generate
from hpc_rl.engines.vllm_engine import VllmEngine

PLAIN = Sampling(1.0, 12)
LONG = Sampling(2.0, 150)
TIGHT_KV_GIB = 6 * 128 * 1024 / 2**30  # six blocks of 128 tokens of 1 KiB


def main(speaker: str, adapter: str, folder: str) -> None:
    found: dict[str, Any] = {}
    engine = VllmEngine(speaker, max_model_len=256, **PIXELS)
    found["plain"] = generate(engine, requests(), PLAIN)
    found["cool"] = generate(engine, requests(), Sampling(0.6, 12))
    found["greedy"] = generate(engine, requests(), Sampling(0.0, 12))
    found["hot"] = generate(engine, requests(samples=16), Sampling(2.0, 40))
    found["many"] = generate(engine, requests(samples=100), Sampling(1.0, 2))  # prompts beyond what one step reads
    found["after others"] = generate(engine, requests(), PLAIN)
    found["alone"] = [generate(engine, [request], PLAIN)[0] for request in requests()]
    found["by path"] = generate(engine, by_path(requests(), Path(folder)), PLAIN)
    found["long"] = generate(engine, requests(), LONG)
    found["last tokens"] = generate(engine, [last_tokens(8)], PLAIN)
    found["stops"] = stops = words_of(found["plain"])[:4]
    found["stopped"] = generate(engine, requests(), Sampling(1.0, 24, stop=stops))
    found["keys in order"], found["in two waves"] = in_two_waves(engine)
    found["after an abort"] = after_an_abort(engine)
    found["refusals"] = refusals(engine, Path(folder))
    found["lost"] = losing_a_request(engine)
    found["prompts kept"] = len(engine._prompts)
    adapted = VllmEngine(
        speaker, Path(adapter), adapter_name="speaker-1", adapter_rank=4, max_model_len=256, variables=NO_THOUGHTS,
        **PIXELS,
    )  # fmt: skip
    found["adapter"] = generate(adapted, requests(), PLAIN)
    tight = VllmEngine(speaker, max_model_len=256, max_num_seqs=12, cpu_kv_cache_gib=TIGHT_KV_GIB, **PIXELS)
    found["capacity"] = tight.capacity
    found["with preemptions"], found["preemptions"] = with_preemptions(tight)
    tight.close()
    (Path(folder) / "completions.json").write_text(json.dumps(found, default=asdict))


def last_tokens(count: int) -> Request:
    prompt = Prompt(Prompt.of(f"{TEXT} Once more: {TEXT}").messages, keep_tokens=count)
    return Request(prompt, 3)


def in_two_waves(engine: VllmEngine) -> tuple[list[str], list[Completion]]:
    """Half of the requests are there at the beginning; the others join later, and are shorter."""
    asked, finished = requests(), []
    for place, request in enumerate(asked[:8]):
        engine.submit(str(place), request, PLAIN)
    finished += [*engine.step(), *engine.step()]
    for place, request in enumerate(asked[8:], 8):
        engine.submit(str(place), request, Sampling(1.0, 3))
    while engine.unfinished:
        finished += engine.step()
    assert engine.step() == []
    by_key = dict(finished)
    return [key for key, _ in finished], [by_key[str(place)] for place in range(len(asked))]


def after_an_abort(engine: VllmEngine) -> dict[str, Completion]:
    """Two of four are dropped on the way, and one of them is asked for once more."""
    asked, finished = requests()[:4], []
    for place, request in enumerate(asked):
        engine.submit(str(place), request, PLAIN)
    finished += [*engine.step(), *engine.step()]
    engine.abort(["1", "3", "nobody"])
    assert engine.unfinished == 2 - len(finished)
    engine.submit("1", asked[1], PLAIN)
    while engine.unfinished:
        finished += engine.step()
    return dict(finished)


def refusals(engine: VllmEngine, folder: Path) -> dict[str, str]:
    """What the engine says to requests that it cannot take; it goes on with the others."""
    (folder / "broken.png").write_bytes(b"no picture")
    asked = requests()[0]
    impossible = {
        "long": (Request(Prompt.of("word " * 300), 0), PLAIN),
        "long with its image": (Request(Prompt.of("a" * 225, pictures()[3]), 0), PLAIN),
        "broken image": (Request(Prompt.of(TEXT, folder / "broken.png"), 0), PLAIN),
        "schema": (asked, Sampling(1.0, 12, json_schema='{"type": "no such type"}')),
        "in flight": (asked, PLAIN),
    }
    said = {}
    engine.submit("in flight", asked, PLAIN)
    for key, (request, sampling) in impossible.items():
        try:
            engine.submit(key, request, sampling)
        except ValueError as error:
            said[key] = str(error)
    ((_, completion),) = [pair for _ in range(12) for pair in engine.step()]
    said["completion in flight"] = completion.text
    return said


def losing_a_request(engine: VllmEngine) -> str:
    """What is said of a request that vLLM will never answer: here because somebody aborted it behind our back."""
    engine.submit("lost", requests()[0], PLAIN)
    engine._engine.abort_request([engine._flights["lost"].name], internal=True)
    try:
        engine.step()
    except EngineFailed as error:
        engine.abort(["lost"])
        return str(error)
    return ""


def with_preemptions(engine: VllmEngine) -> tuple[list[Completion], int]:
    """More and longer completions than its memory holds; and how often one had to give its place up."""
    asked, finished, preempted = requests(), {}, 0
    for place, request in enumerate(asked):
        engine.submit(str(place), request, LONG)
    scheduler = engine._engine.engine_core.engine_core.scheduler
    while engine.unfinished:
        finished.update(engine.step())
        preempted = max([preempted, *(request.num_preemptions for request in scheduler.requests.values())])
    return [finished[str(place)] for place in range(len(asked))], preempted


if __name__ == "__main__":
    main(*sys.argv[1:])
