"""How many samples change with who draws them, and with what is in the batch beside them.

    python -m benchmarks.reproducibility [--model images|text] [--prompts 64] [--samples 8] [--shard-size 16]
        [--dtype float32|bfloat16|float16] [--no-batch-invariant]

Every way of drawing is a process of its own and draws the same samples, with the same seeds, as the sampling job does:
requests of further shards join the running batch as others finish.

    in order            one vLLM engine does all shards: the reference
    reverse order       one vLLM engine does them from the last to the first
    interleaved         one vLLM engine gets the requests of all shards in a random order
    an engine a shard   a new process and vLLM engine for each, as when each array task gets one shard
    transformers        the other engine, in order

Prints for each how many samples have other token ids than the reference's, and the largest difference of a token's
log-probability among those that are the same. Engines ask for vLLM's batch-invariant mode, as the sampling job does by
default; hardware older than an H100, CPUs among it, has none. `images`: the tiny speaker (models/tiny-lewis) describes
rendered scenes; `text`: a tiny chat model with random weights answers questions.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SPEAKER = REPOSITORY / "models" / "tiny-lewis" / "speaker"
PIXELS: dict[str, Any] = {"min_pixels": 784, "max_pixels": 12544}
MAX_MODEL_LEN, MAX_TOKENS, TEMPERATURE, SEED = 256, 48, 1.0, 0

Drawn = dict[str, tuple[list[int], list[float]]]
"""Token ids and log-probabilities, by the sample's name `PROMPT-NUMBER`."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.reproducibility`"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["images", "text"], default="images")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt")
    parser.add_argument("--shard-size", type=int, default=16, help="prompts per shard")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="samples that an engine draws at once")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--batch-invariant", action=argparse.BooleanOptionalAction, default=True, help="where the hardware has the mode"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs=2, metavar=("ENGINE", "ORDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.draw:
        engine, order = options.draw
        (options.folder / f"{engine}-{order}.json").write_text(json.dumps(_draw(options, engine, order)))
        return 0
    if options.prompts % options.shard_size:
        parser.error("--prompts must be a multiple of --shard-size")
    with tempfile.TemporaryDirectory(prefix="hpc_rl-bench-") as folder:
        options.folder = Path(folder)
        _compare_all(options)
    return 0


def _compare_all(options: argparse.Namespace) -> None:
    from tools.tiny_chat_model import write

    started = time.monotonic()
    if options.model == "text":
        write(options.folder / "model")
    reference = _in_a_process(options, "vllm", "in-order")
    shards = range(options.prompts // options.shard_size)
    single: Drawn = {}
    for shard in shards:
        single |= _in_a_process(options, "vllm", f"shard-{shard}")
    others = {
        "reverse order": _in_a_process(options, "vllm", "reverse"),
        "interleaved": _in_a_process(options, "vllm", "interleaved"),
        "an engine a shard": single,
        "transformers": _in_a_process(options, "transformers", "in-order"),
    }
    tokens = sum(len(ids) for ids, _ in reference.values())
    print(
        f"{options.model}, {options.dtype}: {options.prompts} prompts × {options.samples} samples, "
        f"{len(shards)} shards, {tokens} tokens"
    )
    for name, other in others.items():
        print(f"{name:<20} {_compare(reference, other)}")
    print(f"took {time.monotonic() - started:.0f} s")


def _compare(reference: Drawn, other: Drawn) -> str:
    assert reference.keys() == other.keys()
    same = [name for name in reference if reference[name][0] == other[name][0]]
    apart = [abs(a - b) for name in same for a, b in zip(reference[name][1], other[name][1], strict=True)]
    differ = len(reference) - len(same)
    return (
        f"{differ:>4} of {len(reference)} samples differ ({differ / len(reference):.2%}); "
        f"log-probabilities of the others by at most {max(apart, default=0.0):.1e}"
    )


def _in_a_process(options: argparse.Namespace, engine: str, order: str) -> Drawn:
    names = ("model", "prompts", "samples", "shard_size", "max_num_seqs", "dtype", "folder")
    settings = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    settings.append("--batch-invariant" if options.batch_invariant else "--no-batch-invariant")
    command = [sys.executable, "-m", "benchmarks.reproducibility", *settings, "--draw", engine, order]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine}, {order}, ended with {done.returncode}:\n{done.stderr[-3000:]}")
    drawn = json.loads((options.folder / f"{engine}-{order}.json").read_text())
    return {name: (ids, logprobs) for name, (ids, logprobs) in drawn.items()}


def _draw(options: argparse.Namespace, kind: str, order: str) -> Drawn:
    """Draw the samples in this order; whenever fewer are in flight than twice the capacity, the next one joins."""
    from hpc_rl.engines.base import Request, Sampling
    from hpc_rl.run.seeds import derive

    engine = _open(options, kind)
    prompts = dict(enumerate(_prompts(options)))
    samples, drawn = deque(_in_order(options, order)), Drawn()
    while samples or engine.unfinished:
        while samples and engine.unfinished < 2 * engine.capacity:
            place, number = samples.popleft()
            request = Request(prompts[place], derive(SEED, 1, "speaker", str(place), number))
            engine.submit(f"{place}-{number}", request, Sampling(TEMPERATURE, MAX_TOKENS))
        drawn |= {name: (list(made.token_ids), list(made.logprobs)) for name, made in engine.step()}
    return drawn


def _in_order(options: argparse.Namespace, order: str) -> list[tuple[int, int]]:
    """Prompts and numbers of the samples to draw."""
    shards = list(range(options.prompts // options.shard_size))
    if order == "reverse":
        shards.reverse()
    elif order.startswith("shard-"):
        shards = [int(order.removeprefix("shard-"))]
    size = options.shard_size
    wanted = [
        (place, number)
        for shard in shards
        for place in range(shard * size, (shard + 1) * size)
        for number in range(options.samples)
    ]
    if order == "interleaved":
        random.Random(SEED).shuffle(wanted)
    return wanted


def _open(options: argparse.Namespace, kind: str) -> Any:
    settings = {"dtype": options.dtype, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": options.max_num_seqs}
    path, pixels = (str(SPEAKER), PIXELS) if options.model == "images" else (str(options.folder / "model"), {})
    if kind == "vllm":
        from hpc_rl.engines.vllm_engine import VllmEngine

        return VllmEngine(path, batch_invariant=options.batch_invariant, **settings, **pixels)
    from hpc_rl.engines.transformers_engine import TransformersEngine

    return TransformersEngine(path, **settings, **pixels)


def _prompts(options: argparse.Namespace) -> Iterator[Any]:
    from hpc_rl.data import scenes
    from hpc_rl.engines.base import Prompt

    names = [(category, concept) for category in scenes.categories() for concept in scenes.concepts()]
    for place in range(options.prompts):
        if options.model == "images":
            picture = scenes.render(SEED, "train", *names[7 * place % len(names)], view=place // len(names))
            yield Prompt.of("Describe the main subject.", picture)
        else:
            yield Prompt.of(f"Is {place} + {place % 7} = {place + place % 5}? Answer yes or no.")


if __name__ == "__main__":
    sys.exit(main())
