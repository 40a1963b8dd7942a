"""How many samples change with who draws them: one engine for all shards, a new one for each, another order or engine.

    python -m benchmarks.reproducibility [--prompts 16] [--samples 8] [--shard-size 4]

The tiny speaker (models/tiny-lewis) describes rendered scenes. Every way of drawing is a process of its own and draws
the same samples, with the same seeds, shard by shard:

    in order            one vLLM engine does all shards: the reference
    reverse order       one vLLM engine does them from the last to the first
    an engine a shard   a new process and vLLM engine for each, as when each array task gets one shard
    transformers        the other engine, in order

Prints for each how many samples have other token ids than the reference's, and the largest difference of a token's
log-probability among those that are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SPEAKER = REPOSITORY / "models" / "tiny-lewis" / "speaker"
PROBLEM = "Describe the main subject."
PIXELS: dict[str, Any] = {"min_pixels": 784, "max_pixels": 12544}
MAX_MODEL_LEN, MAX_TOKENS, TEMPERATURE, SEED = 256, 48, 1.0, 0

Drawn = dict[str, tuple[list[int], list[float]]]
"""Token ids and log-probabilities, by the sample's name `PROMPT-INDEX`."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.reproducibility`"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt")
    parser.add_argument("--shard-size", type=int, default=4, help="prompts per shard")
    parser.add_argument("--draw", nargs=3, metavar=("ENGINE", "SHARDS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.draw:
        engine, shards, file = options.draw
        drawn: Drawn = {}
        for shard in _draw(engine, [int(s) for s in shards.split(",")], options.samples, options.shard_size):
            drawn |= shard
        Path(file).write_text(json.dumps(drawn))
        return 0
    if options.prompts % options.shard_size:
        parser.error("--prompts must be a multiple of --shard-size")
    started = time.monotonic()
    shards = [str(s) for s in range(options.prompts // options.shard_size)]
    sizes = [f"--samples={options.samples}", f"--shard-size={options.shard_size}"]
    reference = _in_a_process("vllm", shards, sizes)
    assert len(reference) == options.prompts * options.samples
    single: Drawn = {}
    others = {
        "reverse order": _in_a_process("vllm", shards[::-1], sizes),
        "an engine a shard": single,
        "transformers": _in_a_process("transformers", shards, sizes),
    }
    for shard in shards:
        single |= _in_a_process("vllm", [shard], sizes)
    tokens = sum(len(ids) for ids, _ in reference.values())
    print(f"{options.prompts} prompts × {options.samples} samples, {len(shards)} shards, {tokens} tokens")
    for name, other in others.items():
        print(f"{name:<20} {_compare(reference, other)}")
    print(f"took {time.monotonic() - started:.0f} s")
    return 0


def _compare(reference: Drawn, other: Drawn) -> str:
    assert reference.keys() == other.keys()
    same = [name for name in reference if reference[name][0] == other[name][0]]
    apart = [abs(a - b) for name in same for a, b in zip(reference[name][1], other[name][1], strict=True)]
    differ = len(reference) - len(same)
    return (
        f"{differ:>4} of {len(reference)} samples differ ({differ / len(reference):.2%}); "
        f"log-probabilities of the others by at most {max(apart, default=0.0):.1e}"
    )


def _in_a_process(engine: str, shards: Sequence[str], sizes: Sequence[str]) -> Drawn:
    with tempfile.TemporaryDirectory(prefix="hpc_rl-bench-") as folder:
        file = Path(folder) / "drawn.json"
        command = [sys.executable, "-m", "benchmarks.reproducibility", *sizes, "--draw", engine, ",".join(shards)]
        done = subprocess.run([*command, str(file)], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{engine}, shards {shards}, ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return {name: (ids, logprobs) for name, (ids, logprobs) in json.loads(file.read_text()).items()}


def _draw(kind: str, shards: Sequence[int], samples: int, shard_size: int) -> list[Drawn]:
    """Draw these shards in this order, as `jobs.sample` does: one `generate` a shard, nothing remembered between."""
    from hpc_rl.data import scenes
    from hpc_rl.engines.base import Engine, Prompt, Request, Sampling
    from hpc_rl.run.seeds import derive

    engine: Engine
    if kind == "vllm":
        from hpc_rl.engines.vllm_engine import VllmEngine

        engine = VllmEngine(str(SPEAKER), max_model_len=MAX_MODEL_LEN, **PIXELS)
    else:
        from hpc_rl.engines.transformers_engine import TransformersEngine

        engine = TransformersEngine(str(SPEAKER), **PIXELS)
    names = [(category, concept) for category in scenes.categories() for concept in scenes.concepts()]
    drawn = []
    for shard in shards:
        places = range(shard * shard_size, (shard + 1) * shard_size)
        pictures = [
            scenes.render(SEED, "train", *names[7 * place % len(names)], view=place // len(names)) for place in places
        ]
        prompts = dict(zip(places, (Prompt.of(PROBLEM, picture) for picture in pictures), strict=True))
        wanted = [(place, index) for place in places for index in range(samples)]
        requests = [Request(prompts[place], derive(SEED, 1, "speaker", place, index)) for place, index in wanted]
        engine.forget()
        made = engine.generate(requests, Sampling(TEMPERATURE, MAX_TOKENS))
        drawn.append(
            {f"{p}-{i}": (list(c.token_ids), list(c.logprobs)) for (p, i), c in zip(wanted, made, strict=True)}
        )
    return drawn


if __name__ == "__main__":
    sys.exit(main())
