"""What is opened when an engine is: which one, with whose weights, how, and how much less memory than the config says.

A plain value: jobs make it, the door to engines (`opening.py`) reads it, and it goes to a pool's workers as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_rl.config.modeling import ModelConfig
from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines.weights import Weights

Kind = Literal["vllm", "transformers", "auto"]


@dataclass(frozen=True)
class EngineSpec:
    """An engine that somebody wants.

    Attributes
    ----------
    kind
        `sample.engine` or `evaluate.engine`. auto: vllm; transformers where vLLM is not installed or does not know the
        model's architecture, and in no other case.
    model
        Its number type, attention and pixel limits, and where training started.
    sample
        How it samples: memory, GPUs, caches, staging.
    weights
        The weights (`hpc_rl.engines.weights.weights_of`).
    cache_dir
        Where to keep what the engine compiles (`Workspace.compile_cache`); None = nowhere.
    notches
        How often the stage ran out of memory with these settings (`hpc_rl.engines.memory.notches_of`).
    """

    kind: Kind
    model: ModelConfig
    sample: SamplingConfig
    weights: Weights
    cache_dir: Path | None = None
    notches: int = 0
