"""Run by test_yes_no_vllm.py in a process of its own: ask the listener in vLLM, write its answers as JSON."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from engines.asked import PIXELS, QUESTIONS, pictures
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.services import ListenerServiceConfig
from hpc_rl.engines.yes_no_prompts import Unscorable
from hpc_rl.engines.yes_no_vllm import YesNoVllm
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff, listener
from hpc_rl.services.address import Address
from hpc_rl.services.hosting import host
from hpc_rl.services.images import ImageRoots
from hpc_rl.services.pair_scorer import PairScorer


def main(folder: str, out: str) -> None:
    root = Path(out).parent / "run"
    config = LewisConfig.model_validate(
        {
            "run": {"name": "t", "workspace": root},
            "speaker": {"path": "unused"},
            "listener": {"path": folder, "dtype": "float32", **PIXELS},
            "data": {"scenes": {}},
            "services": {"listener": {"engine": "vllm", "max_model_len": 1024}},
        }
    )
    model = listener.open_judge(config.listener, config.services.listener)
    assert isinstance(model, YesNoVllm)
    images = model.encode([model.prepare(picture) for picture in pictures()])
    pairs = [(image, question) for image in images for question in QUESTIONS]
    found: dict[str, Any] = {"tokens": [image.tokens for image in images]}
    found["all"] = model.yes_probabilities(pairs)
    found["tokens made"] = model.tokens_made
    outputs = watch(model)
    found["again"] = model.yes_probabilities([(images[3], "red or blue?"), (images[0], QUESTIONS[0])])
    found["cached"] = [output.num_cached_tokens for output in outputs]
    asked = [(images[0], text) for text in ("red?", "red <|image_pad|>?", "red " * 1200, "red?")]
    found["refused"] = [p.reason if isinstance(p, Unscorable) else p for p in model.yes_probabilities(asked)]
    found["over http"] = over_http(model, root, config.services.listener)
    found["nan"] = [str(p) for p in broken(folder, root / "broken").yes_probabilities(pairs[:1])]
    Path(out).write_text(json.dumps(found))


def watch(model: Any) -> list[Any]:
    """What vLLM answers from now on."""
    outputs: list[Any] = []
    read = model._read
    model._read = lambda output: outputs.append(output) or read(output)
    return outputs


def over_http(model: YesNoVllm, root: Path, options: ListenerServiceConfig) -> Any:
    """What a service says whose model was loaded in this thread and runs in the batcher's."""
    (root / "images").mkdir(parents=True)
    for place, picture in enumerate(pictures()):
        picture.save(root / "images" / f"{place}.png")
    service = listener.service_of(PairScorer(model, ImageRoots([root / "images"], options)), options)
    folder = Workspace(root).service_dir("listener")
    hosted = host(service, folder=folder, address=Address("127.0.0.1", "127.0.0.1"), options=options)
    paths = [f"{place}.png" for place in range(4)]
    said = httpx.post(
        f"{hosted.publication.endpoint.url}/batch_score",
        json={"batch": [{"candidate_paths": paths, "question": question} for question in QUESTIONS]},
        headers={"Authorization": f"Bearer {handoff.read_token(folder)}"},
        trust_env=False,
        timeout=60,
    ).json()
    hosted.leave(0.0)
    return {"results": said["results"], "tokens": service.tokens.prompt}


def broken(folder: str, into: Path) -> YesNoVllm:
    """The model with weights that are no numbers."""
    into.mkdir()
    for file in Path(folder).iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    weights = load_file(into / "model.safetensors")
    name = next(name for name in weights if name.endswith("language_model.norm.weight") or name == "model.norm.weight")
    weights[name] = torch.full_like(weights[name], math.nan)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return YesNoVllm(str(into), max_model_len=1024, **PIXELS)


if __name__ == "__main__":
    main(*sys.argv[1:])
