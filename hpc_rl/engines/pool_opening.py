"""A pool of the run's engines: how many, on which GPUs, and how each worker opens its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_rl.config.gpu_shares import share_gpus
from hpc_rl.config.modeling import SpeakerConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.base import Engine
from hpc_rl.engines.gpus import task_gpus
from hpc_rl.engines.memory import most_notches
from hpc_rl.engines.node_disk import node_folder
from hpc_rl.engines.pool import EnginePool


@dataclass(frozen=True)
class OpenEngine:
    """`open_engine` with its arguments, for a worker."""

    kind: Literal["vllm", "transformers", "auto"]
    speaker: SpeakerConfig
    sample: SampleConfig
    base: str
    adapter: Path | None = None
    weights_hash: str = ""
    cache_dir: Path | None = None

    def __call__(self, notches: int) -> Engine:
        """The engine, with less memory after running out of it `notches` times."""
        from hpc_rl.engines.opening import open_engine

        return open_engine(
            self.kind,
            self.speaker,
            self.sample,
            base=self.base,
            adapter=self.adapter,
            weights_hash=self.weights_hash,
            cache_dir=self.cache_dir,
            notches=notches,
        )


def open_pool(
    kind: Literal["vllm", "transformers", "auto"],
    speaker: SpeakerConfig,
    sample: SampleConfig,
    *,
    base: str,
    adapter: Path | None,
    weights_hash: str,
    cache_dir: Path | None = None,
    notches: int = 0,
) -> EnginePool:
    """A pool of `sample.data_parallel_size` workers on the task's GPUs, or on those of them in `sample.gpu_ids`.

    Parameters are those of `hpc_rl.engines.opening.open_engine`.

    Raises
    ------
    GpuShareError
        When the task has not the GPUs that the config shares out.
    NoNodeFolder
        When `stage_to` cannot be used.
    """
    gpus = share_gpus(task_gpus(), sample.data_parallel_size, sample.gpu_ids, sample.tensor_parallel_size)
    if sample.stage_to is not None:  # workers have a TMPDIR of their own, and share what is staged
        sample = sample.model_copy(update={"stage_to": str(node_folder(sample.stage_to, os.environ).parent)})
    return EnginePool(
        OpenEngine(kind, speaker, sample, base, adapter, weights_hash, cache_dir),
        sample.data_parallel_size,
        gpus=gpus,
        notches=notches,
        most_notches=most_notches(sample, kind, has_gpus=bool(gpus[0])),
    )
