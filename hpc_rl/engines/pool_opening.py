"""A pool of the run's engines: whether there is one, on which GPUs, and how each worker opens its own."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hpc_rl.config.gpu_shares import share_gpus
from hpc_rl.engines.described import DescribedEngine
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.gpus import task_gpus
from hpc_rl.engines.memory import most_notches
from hpc_rl.engines.node_disk import node_folder
from hpc_rl.engines.opening import open_engine
from hpc_rl.engines.pool import EnginePool


@dataclass(frozen=True)
class OpenEngine:
    """`open_engine` for a worker."""

    spec: EngineSpec

    def __call__(self, notches: int) -> DescribedEngine:
        """The engine, with less memory after running out of it `notches` times."""
        return open_engine(replace(self.spec, notches=notches))


def open_engines(spec: EngineSpec) -> DescribedEngine:
    """A task's engines as one: a pool where `data_parallel_size` or `gpu_ids` ask for it, else one in this process.

    Raises what `open_engine` and `open_pool` do.
    """
    several = spec.sample.data_parallel_size > 1 or spec.sample.gpu_ids is not None
    return open_pool(spec) if several else open_engine(spec)


def open_pool(spec: EngineSpec) -> EnginePool:
    """A pool of `sample.data_parallel_size` workers on the task's GPUs, or on those of them in `sample.gpu_ids`.

    Raises
    ------
    GpuShareError
        When the task has not the GPUs that the config shares out.
    NoNodeFolder
        When `stage_to` cannot be used.
    """
    sample = spec.sample
    gpus = share_gpus(task_gpus(), sample.data_parallel_size, sample.gpu_ids, sample.tensor_parallel_size)
    if sample.stage_to is not None:  # workers have a TMPDIR of their own, and share what is staged
        sample = sample.model_copy(update={"stage_to": str(node_folder(sample.stage_to, os.environ).parent)})
    return EnginePool(
        OpenEngine(replace(spec, sample=sample)),
        sample.data_parallel_size,
        gpus=gpus,
        notches=spec.notches,
        most_notches=most_notches(sample, spec.kind, has_gpus=bool(gpus[0])),
        patience_s=sample.worker_patience_s,
    )
