"""Which engine a stage uses, opened with the run's settings."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Engine


def open_engine(
    kind: Literal["vllm", "transformers"],
    speaker: SpeakerConfig,
    sample: SampleConfig,
    *,
    base: str,
    adapter: Path | None,
    weights_hash: str,
) -> Engine:
    """An engine with the speaker's weights in it.

    Parameters
    ----------
    kind
        `sample.engine` or `evaluate.engine`. One that cannot be loaded is an error: the other does not step in.
    base, adapter, weights_hash
        The weights (`hpc_rl.engines.weights.speaker_weights`).
    """
    if kind == "transformers":
        from hpc_rl.engines.transformers_engine import TransformersEngine

        return TransformersEngine(
            base,
            adapter,
            merge=sample.merge_adapter,
            dtype=speaker.dtype,
            attention=speaker.attn_implementation,
            min_pixels=speaker.min_pixels,
            max_pixels=speaker.max_pixels,
        )
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

    return VllmEngine(
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
