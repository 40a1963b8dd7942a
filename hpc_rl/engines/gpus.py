"""Which GPUs a task has, and whether it has those that it asked for."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping

from hpc_rl.config.schema import Config

log = logging.getLogger(__name__)

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


class NoGpuError(RuntimeError):
    """A job that asked for GPUs sees none; the message says what to look at."""


def check_gpus(config: Config, stage: str, environ: Mapping[str, str] = os.environ) -> None:
    """Make sure that a stage with `gpus_per_node` does not work on CPUs, where it would run into its time limit.

    Where nobody deals out GPUs, as on a laptop with the local executor, it may, and a warning says so.

    Raises
    ------
    NoGpuError
        When this process was given GPUs, by Slurm or by CUDA_VISIBLE_DEVICES, and torch sees none.
    """
    asked = config.stage(stage).gpus_per_node
    if not asked:
        return
    import torch

    if torch.cuda.is_available():
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    seen = (
        f"stages.{stage}.gpus_per_node is {asked}, but torch sees no GPU on {socket.gethostname()} "
        f"(CUDA_VISIBLE_DEVICES: {'not set' if visible is None else visible or 'empty'}; torch {torch.__version__}, "
        f"built for CUDA: {torch.version.cuda or 'no'})"
    )
    given = "SLURM_JOB_ID" in environ or bool(visible and task_gpus(environ))
    if config.cluster.allow_no_gpu or not given:
        log.warning("%s: working on the CPU, which is slow", seen)
        return
    raise NoGpuError(
        f"{seen}. See whether nvidia-smi works there, whether the environment's torch is built for CUDA, and whether a "
        f"container passes GPUs on (--nv). To work on CPUs, set stages.{stage}.gpus_per_node to 0"
    )
