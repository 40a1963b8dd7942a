"""Starting vLLM in this process.

vLLM is told by environment variables how to behave, so they are set here before it is imported, and a process holds
one engine in its life: `del` gives no memory back, and a stage is a process of its own anyway.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

CPU_KV_CACHE_GIB = 1
INVARIANT_FROM_CAPABILITY = (9, 0)
"""vLLM's batch-invariant mode wants an H100 or newer (vllm/envs.py, VLLM_BATCH_INVARIANT)."""


def start_vllm(
    path: str,
    *,
    dtype: str,
    max_model_len: int | None,
    gpu_memory_utilization: float,
    batch_invariant: bool = False,
    **options: Any,
) -> Any:
    """A `vllm.LLM` on all GPUs that this process may see, else on the CPU.

    Parameters
    ----------
    path
        Model folder.
    dtype
        Number type of weights and activations.
    max_model_len
        Longest prompt and completion together, in tokens; None = the model's own limit.
    gpu_memory_utilization
        Share of each GPU's memory to take.
    batch_invariant
        Ask for the mode in which a result does not depend on its batch, where the hardware has it.
    options
        More arguments of `vllm.LLM`.
    """
    on_gpu = torch.cuda.is_available()
    _set_environment(on_gpu, batch_invariant)
    from vllm import LLM

    if max_model_len is not None:
        options["max_model_len"] = max_model_len
    if on_gpu:
        options |= {
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": torch.cuda.device_count(),  # one engine on all GPUs that the task was given
        }
    return LLM(model=path, dtype=dtype, seed=0, enforce_eager=not on_gpu, **options)  # requests bring their own seeds


def _set_environment(on_gpu: bool, batch_invariant: bool) -> None:
    """Set what vLLM reads when it is imported. What the user has set stays."""
    caches = Path(tempfile.mkdtemp(prefix="hpc_rl-vllm-"))  # tasks that share a compile cache corrupt it
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    defaults = {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not on_gpu:
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # tasks on one machine would all be bound to its first cores
            "TORCHDYNAMO_DISABLE": "1",
        }
    if not on_gpu or torch.cuda.device_count() == 1:
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if batch_invariant and on_gpu:
        if torch.cuda.get_device_capability() >= INVARIANT_FROM_CAPABILITY:
            defaults["VLLM_BATCH_INVARIANT"] = "1"
        else:
            log.warning("this GPU has no batch-invariant mode in vLLM: a few samples may depend on their batch")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
