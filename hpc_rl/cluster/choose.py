"""Which executor a config means on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

from hpc_rl.cluster.base import Executor
from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config


def executor_name(config: Config) -> str:
    """`cluster.executor` with `auto` resolved: slurm where there is an sbatch, else local."""
    name = config.cluster.executor
    return name if name != "auto" else ("slurm" if shutil.which("sbatch") else "local")


def make_executor(config: Config, name: str) -> Executor:
    """The executor `name`, set up from the config. Modules are imported here so that a plan needs none of them."""
    if name == "slurm":
        from hpc_rl.cluster.slurm import SlurmExecutor

        return SlurmExecutor(config.cluster.max_array_size)
    if name == "local":
        from hpc_rl.cluster.local import LocalExecutor

        return LocalExecutor(config.local.max_parallel_tasks, gpu_ids(os.environ))
    from hpc_rl.cluster.debug import DebugExecutor

    return DebugExecutor()


def gpu_ids(environ: Mapping[str, str]) -> list[str]:
    """GPUs of this machine: those of CUDA_VISIBLE_DEVICES, else what nvidia-smi lists; none where there is none."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [gpu for gpu in environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def slurm_problems(config: Config) -> list[Problem]:
    """What Slurm here would refuse: no sbatch at all, unknown partitions, accounts that this user may not charge."""
    from hpc_rl.cluster import queries

    if shutil.which("sbatch") is None:
        way_out = "run on a login node of the cluster, or take --executor local (or debug)"
        return [Problem("cluster.executor", "slurm, but there is no sbatch on the PATH", way_out=way_out)]
    partitions, accounts = queries.partitions(), queries.accounts()
    wanted = [(f"stages.{name}", config.stage(name)) for name in config.stages]
    found = {}
    for where, stage in wanted:
        for partition in (stage.partition or "").split(","):
            if partition and partition not in partitions:
                field = "cluster.partition" if partition == config.cluster.partition else f"{where}.partition"
                expected = f"one of {', '.join(sorted(partitions))}"
                found[field] = Problem(field, f"Slurm has no partition {partition!r}", expected, "`sinfo` lists them")
        if stage.account and accounts is not None and stage.account not in accounts:
            field = "cluster.account" if stage.account == config.cluster.account else f"{where}.account"
            expected = f"one of {', '.join(sorted(accounts))}"
            way_out = "`sacctmgr show associations user=$USER` lists yours"
            found[field] = Problem(field, f"you may not charge account {stage.account!r}", expected, way_out)
    return list(found.values())
