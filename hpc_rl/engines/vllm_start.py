"""Starting vLLM in this process.

vLLM is told by environment variables how to behave, so they are set here before it is imported, and a process holds
one engine in its life: `del` gives no memory back, and a stage is a process of its own anyway.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hpc_rl.config.gpu_shares import count

log = logging.getLogger(__name__)

CPU_KV_CACHE_GIB = 1.0
INVARIANT_FROM_CAPABILITY = (9, 0)
"""vLLM's batch-invariant mode wants an H100 or newer (vllm/envs.py, VLLM_BATCH_INVARIANT)."""
CACHE_VARIABLES = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Where vLLM, torch and Triton keep what they compile, and what the folder is called in ours."""


class VllmMissing(ValueError):
    """vLLM is asked for and not installed in this environment; the message says what to do."""


def check_installed() -> None:
    """VllmMissing when this environment has no vLLM. It is not imported."""
    if importlib.util.find_spec("vllm") is None:
        raise VllmMissing(
            f"vLLM is not installed for {sys.executable}. Install it there, name an interpreter that has it "
            "(stages.NAME.python), or set the engine to transformers; with auto whichever is there is taken"
        )


def import_vllm(
    *, batch_invariant: bool = False, tensor_parallel_size: int | None = None, compile_cache: Path | None = None
) -> None:
    """Set what vLLM reads when it is imported, and import it. Once it is imported this changes nothing more.

    Raises
    ------
    VllmMissing
        When it is not installed.
    """
    check_installed()
    on_gpu = torch.cuda.is_available()
    engine_gpus = (tensor_parallel_size or torch.cuda.device_count()) if on_gpu else 0
    _set_environment(on_gpu, engine_gpus > 1, batch_invariant, compile_cache)
    import vllm  # noqa: F401


def start_vllm(
    path: str,
    *,
    dtype: str,
    max_model_len: int | None,
    gpu_memory_utilization: float,
    batch_invariant: bool = False,
    max_num_seqs: int | None = None,
    tensor_parallel_size: int | None = None,
    load_strategy: str | None = None,
    compile_cache: Path | None = None,
    cpu_kv_cache_gib: float | None = None,
    **options: Any,
) -> Any:
    """A `vllm.LLM` on the GPUs that this process may see, else on the CPU.

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
    max_num_seqs
        Sequences worked on at once; None = vLLM's own choice.
    tensor_parallel_size
        GPUs of the engine; None = all that this process may see.
    load_strategy
        How safetensors are read: lazy, eager or prefetch (vllm/config/load.py); None = vLLM's own choice.
    compile_cache
        Folder, of this process alone, for what is compiled; None = one that is removed at the process's end. Variables
        that are set already (`CACHE_VARIABLES`) win.
    cpu_kv_cache_gib
        Memory for the KV cache where there is no GPU; None = VLLM_CPU_KVCACHE_SPACE, or 1 GiB.
    options
        More arguments of `vllm.LLM`.

    Raises
    ------
    VllmMissing
        When vLLM is not installed.
    ValueError
        When it asks for more GPUs than there are, and for whatever vLLM refuses.
    """
    on_gpu, seen = torch.cuda.is_available(), torch.cuda.device_count()
    if on_gpu and (tensor_parallel_size or 1) > seen:
        raise ValueError(
            f"sample.tensor_parallel_size is {tensor_parallel_size}, but this process sees {count(seen)} "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): give it as many "
            "(stages.NAME.gpus_per_node), or set it to null for all that there are"
        )
    if on_gpu and tensor_parallel_size and tensor_parallel_size < seen:
        log.warning(
            "tensor_parallel_size is %d: %d of %d GPUs are idle",
            tensor_parallel_size,
            seen - tensor_parallel_size,
            seen,
        )
    import_vllm(batch_invariant=batch_invariant, tensor_parallel_size=tensor_parallel_size, compile_cache=compile_cache)
    from vllm import LLM

    if on_gpu:
        options |= {
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size or seen,
        }
    else:
        options |= {"tensor_parallel_size": tensor_parallel_size or 1, **_cpu_kv_cache(cpu_kv_cache_gib)}
    given = {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "safetensors_load_strategy": load_strategy,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    return LLM(model=path, dtype=dtype, seed=0, enforce_eager=not on_gpu, **options)  # requests bring their own seeds


def _cpu_kv_cache(gib: float | None) -> dict[str, int]:
    """The argument for it. On CPUs VLLM_CPU_KVCACHE_SPACE, in whole GiB, would win over it (vllm/platforms/cpu.py)."""
    variable = "VLLM_CPU_KVCACHE_SPACE"
    if gib is None and os.environ.get(variable):
        return {}
    if os.environ.pop(variable, ""):
        log.warning("%s is not heeded: the config says %g GiB (cpu_kv_cache_gib)", variable, gib)
    return {"kv_cache_memory_bytes": int((gib or CPU_KV_CACHE_GIB) * 2**30)}


def _set_environment(on_gpu: bool, several_gpus: bool, batch_invariant: bool, compile_cache: Path | None) -> None:
    """Set what vLLM reads when it is imported. What the user has set stays."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not CACHE_VARIABLES.keys() <= os.environ.keys():
        if compile_cache is None:
            compile_cache = Path(tempfile.mkdtemp(prefix="hpc_rl-vllm-"))  # tasks that share one corrupt it
            atexit.register(shutil.rmtree, compile_cache, ignore_errors=True)
        defaults |= {variable: str(compile_cache / name) for variable, name in CACHE_VARIABLES.items()}
    if not on_gpu:
        defaults |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # tasks on one machine would all be bound to its first cores
            "TORCHDYNAMO_DISABLE": "1",
        }
    if not several_gpus:
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if batch_invariant and on_gpu:
        if torch.cuda.get_device_capability() >= INVARIANT_FROM_CAPABILITY:
            defaults["VLLM_BATCH_INVARIANT"] = "1"
        else:
            log.warning("this GPU has no batch-invariant mode in vLLM: a few samples may depend on their batch")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
