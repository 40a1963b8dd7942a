"""Which GPUs a task has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_GPU = re.compile(r"\d+|GPU-.+|MIG-.+")


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
