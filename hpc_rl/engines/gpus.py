"""Which GPUs a task has, and which of them each of its engines gets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

_GPU = re.compile(r"\d+|GPU-.+|MIG-.+")


class GpuShareError(ValueError):
    """GPUs that cannot be shared out as the config says; the message names the field."""


def task_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The GPUs of this task by the names that CUDA_VISIBLE_DEVICES takes: numbers, `GPU-<uuid>` or `MIG-<uuid>`.

    Where the variable is not set they are all that the driver shows. As in CUDA, an entry that names no GPU ends the
    list (CUDA C++ Programming Guide, "CUDA Environment Variables"): -1, or Slurm's `NoDevFiles`.
    """
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        return tuple(str(number) for number in range(torch.cuda.device_count()))  # asks NVML, takes no GPU memory
    gpus: list[str] = []
    for entry in (part.strip() for part in named.split(",")):
        if not _GPU.fullmatch(entry):
            break
        gpus.append(entry)
    return tuple(gpus)


def share_gpus(
    gpus: Sequence[str], engines: int, gpu_ids: Sequence[int] | None = None, per_engine: int | None = None
) -> list[tuple[str, ...]]:
    """The GPUs of each engine, neighbours together; none for any where the task has none.

    Parameters
    ----------
    gpus
        The task's (`task_gpus`).
    engines
        `data_parallel_size`.
    gpu_ids
        Those to use, as places in `gpus`: 0 is the first GPU that the task sees, whatever the node calls it.
    per_engine
        `tensor_parallel_size`; None = an equal share of all.

    Raises
    ------
    GpuShareError
        When there are too few, or they cannot be shared equally.
    """
    if gpu_ids is not None:
        beyond = [number for number in gpu_ids if number >= len(gpus)]
        if beyond:
            sees = f"the task sees {len(gpus)} GPUs ({', '.join(gpus) or 'none'})"
            raise GpuShareError(f"gpu_ids: {beyond} of {list(gpu_ids)}, but {sees}; they are numbered from 0")
        gpus = [gpus[number] for number in gpu_ids]
    if not gpus:
        return [()] * engines
    wanted = f"data_parallel_size: {engines} engines"
    if per_engine is None:
        if len(gpus) % engines:
            raise GpuShareError(f"{wanted} cannot share {len(gpus)} GPUs equally; set tensor_parallel_size or gpu_ids")
        per_engine = len(gpus) // engines
    if engines * per_engine > len(gpus):
        raise GpuShareError(f"{wanted} of {per_engine} GPUs each need {engines * per_engine}; there are {len(gpus)}")
    shares = [tuple(gpus[first : first + per_engine]) for first in range(0, engines * per_engine, per_engine)]
    if per_engine > 1 and any(gpu.startswith("MIG-") for gpu in gpus):
        # a process uses one MIG instance at most (NVIDIA MIG User Guide, "CUDA Visible Devices")
        raise GpuShareError(f"tensor_parallel_size: {per_engine}, but slices of a GPU (MIG) cannot work as one; set 1")
    return shares
