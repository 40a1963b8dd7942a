"""How the GPUs of a task are shared out among its engines. The config is checked with it, and each task does it."""

from __future__ import annotations

from collections.abc import Sequence


class GpuShareError(ValueError):
    """GPUs that cannot be shared out as the config says.

    Attributes
    ----------
    field
        The field of `sample` that asks for them.
    what
        Why it cannot be.
    way_out
        What to change.
    """

    def __init__(self, field: str, what: str, way_out: str) -> None:
        super().__init__(f"{field}: {what}; {way_out}")
        self.field, self.what, self.way_out = field, what, way_out


def share_gpus(
    gpus: Sequence[str], engines: int, gpu_ids: Sequence[int] | None = None, per_engine: int | None = None
) -> list[tuple[str, ...]]:
    """The GPUs of each engine, neighbours together; none for any where the task has none.

    Parameters
    ----------
    gpus
        The task's (`hpc_rl.engines.gpus.task_gpus`).
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
            sees = f"the task has {count(len(gpus))} ({', '.join(gpus) or 'none'})"
            way_out = "number them from 0, as the task sees them, or raise the stage's gpus_per_node"
            raise GpuShareError("gpu_ids", f"{beyond} of {list(gpu_ids)}, but {sees}", way_out)
        gpus = [gpus[number] for number in gpu_ids]
    if not gpus:
        return [()] * engines
    if per_engine is None:
        if len(gpus) % engines:
            what = f"{engines} engines cannot share {count(len(gpus))} equally"
            way_out = "set tensor_parallel_size (GPUs of one engine) or gpu_ids, or change the stage's gpus_per_node"
            raise GpuShareError("data_parallel_size", what, way_out)
        per_engine = len(gpus) // engines
    needed = engines * per_engine
    if needed > len(gpus):
        field = "data_parallel_size" if engines > 1 else "tensor_parallel_size"
        who = f"{engines} engines" if engines > 1 else "one engine"
        what = f"{who} of {count(per_engine)}{' each' * (engines > 1)}, but the task has {len(gpus)}"
        raise GpuShareError(field, what, f"lower it, or raise the stage's gpus_per_node to {needed}")
    if per_engine > 1 and any(gpu.startswith("MIG-") for gpu in gpus):
        # a process uses one MIG instance at most (NVIDIA MIG User Guide, "CUDA Visible Devices")
        what = f"{per_engine}, but slices of a GPU (MIG) cannot work as one"
        raise GpuShareError("tensor_parallel_size", what, "set it to 1")
    return [tuple(gpus[first : first + per_engine]) for first in range(0, needed, per_engine)]


def count(gpus: int) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{gpus} GPU{'s' * (gpus != 1)}"
