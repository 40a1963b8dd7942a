"""This machine, where the run's jobs are processes here: its GPUs and its memory against what stages ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpc_rl.cluster.choose import gpu_ids
from hpc_rl.health.findings import Finding, Subject
from hpc_rl.units import size

AREA = "GPUs"
DRIVER = Path("/proc/driver/nvidia/gpus")
GIB = 1 << 30


def machine(subject: Subject, environ: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> Iterator[Finding]:
    """GPUs and memory."""
    wanted = {name: subject.config.stage(name) for name in subject.stage_names}
    asked = {name: stage.gpus_per_node * stage.nodes for name, stage in wanted.items()}
    most = max(asked.values(), default=0)
    have = _gpus(environ, driver) if subject.quick else len(gpu_ids(environ))
    greedy = [name for name, gpus in asked.items() if gpus > have]
    if not most:
        yield Finding(AREA, "ok", f"no stage asks for GPUs; this machine shows {have}")
    elif not have:
        what = f"{', '.join(greedy)} ask for up to {most} GPUs, and this machine shows none"
        remedy = "see whether nvidia-smi works here; without GPUs these stages work on the CPU, which is slow"
        yield Finding(AREA, "warning", what, remedy)
    elif greedy:
        what = f"{', '.join(greedy)} ask for up to {most} GPUs, and this machine shows {have}"
        first = greedy[0]
        fields = {"gpus_per_node": have, "nodes": 1}
        if (wanted[first].ranks_per_node or 0) > have:
            fields["ranks_per_node"] = have
        remedy = " ".join(f"--set stages.{first}.{name}={value}" for name, value in fields.items())
        yield Finding(AREA, "problem", what, remedy)
    else:
        yield Finding(AREA, "ok", f"stages ask for up to {most} GPUs; this machine shows {have}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, stage in wanted.items():
        if stage.mem_gb is not None and stage.mem_gb * GIB > memory:
            what = f"stages.{name}.mem_gb is {stage.mem_gb:g}, and this machine has {size(memory)}"
            yield Finding("memory", "warning", what, "jobs here are not held to it: see that they fit, or lower it")


def _gpus(environ: Mapping[str, str], driver: Path) -> int:
    """As `gpu_ids`, by the driver's list of them: nvidia-smi may take seconds."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return len(gpu_ids(environ))
    return len(list(driver.iterdir())) if driver.is_dir() else 0
