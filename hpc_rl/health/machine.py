"""This machine, where the run's jobs are processes here: its GPUs and its memory against what stages ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpc_rl.cluster.choose import gpu_ids
from hpc_rl.health.findings import Finding, Subject, of_problem
from hpc_rl.orchestrate.gpus import gpu_problems, gpus_at_once
from hpc_rl.units import size

AREA = "GPUs"
DRIVER = Path("/proc/driver/nvidia/gpus")
GIB = 1 << 30


def machine(subject: Subject, environ: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> Iterator[Finding]:
    """GPUs and memory."""
    asked = gpus_at_once(subject.config, subject.graph)
    most = max(asked.values(), default=0)
    have = _gpus(environ, driver) if subject.quick else len(gpu_ids(environ))
    # a debug run is one process, whose stages share what there is
    problems = gpu_problems(subject.config, subject.graph, have) if subject.executor == "local" else []
    if not most:
        yield Finding(AREA, "ok", f"no stage asks for GPUs; this machine shows {have}")
    elif not have:
        greedy = [names[0] for names, gpus in asked.items() if gpus and len(names) == 1]
        what = f"{', '.join(greedy)} ask for up to {most} GPUs, and this machine shows none"
        remedy = "see whether nvidia-smi works here; without GPUs these stages work on the CPU, which is slow"
        yield Finding(AREA, "warning", what, remedy)
    elif not problems:
        yield Finding(AREA, "ok", f"stages ask for up to {most} GPUs at once; this machine shows {have}")
    yield from (of_problem(AREA, problem) for problem in problems)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in subject.stage_names:
        stage = subject.config.stage(name)
        if stage.mem_gb is not None and stage.mem_gb * GIB > memory:
            what = f"stages.{name}.mem_gb is {stage.mem_gb:g}, and this machine has {size(memory)}"
            yield Finding("memory", "warning", what, "jobs here are not held to it: see that they fit, or lower it")


def _gpus(environ: Mapping[str, str], driver: Path) -> int:
    """As `gpu_ids`, by the driver's list of them: nvidia-smi may take seconds."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return len(gpu_ids(environ))
    return len(list(driver.iterdir())) if driver.is_dir() else 0
