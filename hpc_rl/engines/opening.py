"""Which engine a stage uses, opened with the run's settings."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Completion, Engine, Request, Sampling


class OpenedEngine:
    """An engine, and what opening it was like.

    Attributes
    ----------
    description
        What is really used, for manifests and reports: which engine and why, its memory, how it was loaded.
    loading
        Seconds by part: import, staging, merging, engine (reading the weights included).
    """

    def __init__(self, engine: Engine, description: Mapping[str, object], loading: Mapping[str, float]) -> None:
        self._engine: Any = engine
        self.description, self.loading = description, loading

    @property
    def capacity(self) -> int:
        """See `Engine.capacity`."""
        return int(self._engine.capacity)

    @property
    def unfinished(self) -> int:
        """See `Engine.unfinished`."""
        return int(self._engine.unfinished)

    def submit(self, key: str, request: Request, sampling: Sampling) -> None:
        """See `Engine.submit`."""
        self._engine.submit(key, request, sampling)

    def step(self) -> list[tuple[str, Completion]]:
        """See `Engine.step`."""
        made: list[tuple[str, Completion]] = self._engine.step()
        return made

    def abort(self, keys: Collection[str]) -> None:
        """See `Engine.abort`."""
        self._engine.abort(keys)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def open_engine(
    kind: Literal["vllm", "transformers", "auto"],
    speaker: SpeakerConfig,
    sample: SampleConfig,
    *,
    base: str,
    adapter: Path | None,
    weights_hash: str,
    cache_dir: Path | None = None,
    notches: int = 0,
) -> OpenedEngine:
    """An engine with the speaker's weights in it.

    Parameters
    ----------
    kind
        `sample.engine` or `evaluate.engine`.
    base, adapter, weights_hash
        The weights (`hpc_rl.engines.weights.speaker_weights`).
    cache_dir
        The workspace's folder for what engines compile (`Workspace.compile_cache`); None = keep nothing.
    notches
        How often the stage ran out of memory with these settings (`hpc_rl.engines.memory.notches_of`).
    """
    started = time.monotonic()
    if kind == "transformers":
        from hpc_rl.engines.transformers_engine import TransformersEngine

        engine: Any = TransformersEngine(
            base,
            adapter,
            merge=sample.merge_adapter,
            dtype=speaker.dtype,
            attention=speaker.attn_implementation,
            min_pixels=speaker.min_pixels,
            max_pixels=speaker.max_pixels,
        )
        return OpenedEngine(engine, {"engine": kind, "asked": kind}, {"engine": time.monotonic() - started})
    rank = 0
    if adapter is not None:
        from hpc_rl.engines.merging import lora_rank, merge_adapter

        if sample.merge_adapter:
            folder = Path(tempfile.mkdtemp(prefix="hpc_rl-merged-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            base, adapter = str(merge_adapter(base, adapter, speaker.dtype, folder)), None
        else:
            rank = lora_rank(adapter)
    from hpc_rl.engines.vllm_engine import VllmEngine

    engine = VllmEngine(
        base,
        adapter,
        adapter_name=f"speaker-{weights_hash[:16]}",
        adapter_rank=rank,
        dtype=speaker.dtype,
        min_pixels=speaker.min_pixels,
        max_pixels=speaker.max_pixels,
        max_model_len=sample.max_model_len,
        gpu_memory_utilization=sample.gpu_memory_utilization,
        batch_invariant=sample.batch_invariant,
    )
    return OpenedEngine(engine, {"engine": "vllm", "asked": kind}, {"engine": time.monotonic() - started})
