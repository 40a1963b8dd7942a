"""Run by test_opening.py in processes of their own: open an engine as a job does, and write down what came of it."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from engines.conftest import PIXELS, requests
from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Sampling, generate
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.opening import open_engine
from hpc_rl.engines.weights import Weights


def open_and_sample(asked: dict[str, Any]) -> dict[str, Any]:
    """Open an engine, sample with it, close it; what it said of itself, and its tokens."""
    adapter, cache = asked.get("adapter"), asked.get("cache_dir")
    sample = SampleConfig(max_tokens=12, max_model_len=256, **asked["sample"])
    engine = open_engine(
        EngineSpec(
            sample.engine,
            SpeakerConfig(path=asked.get("start", asked["base"]), dtype="float32", **PIXELS),
            sample,
            Weights(asked["base"], Path(adapter) if adapter else None, "0123456789abcdef0123456789abcdef"),
            cache_dir=Path(cache) if cache else None,
            notches=asked.get("notches", 0),
        )
    )
    made = generate(engine, requests(samples=2), Sampling(1.0, 12))
    engine.close()
    return {
        "kind": engine.kind,
        "description": dict(engine.description),
        "loading": dict(engine.loading),
        "tokens": [list(completion.token_ids) for completion in made],
    }


def main(out: Path, *asked: dict[str, Any]) -> None:
    """Open one engine after the other; all but the last may fail, which is written down too."""
    found: list[dict[str, Any]] = []
    for one in asked[:-1]:
        try:
            found.append(open_and_sample(one))
        except ValueError as error:
            found.append({"failed": str(error)})
        out.write_text(json.dumps(found))
    out.write_text(json.dumps([*found, open_and_sample(asked[-1])]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
    main(Path(sys.argv[1]), *map(json.loads, sys.argv[2:]))
