"""From a stage of the graph and the config to a job request: resources, command line, environment."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

from hpc_rl.cluster.base import JobRequest, Resources
from hpc_rl.cluster.entry import Spec
from hpc_rl.config.schema import SIGNAL_EARLY_S, Config
from hpc_rl.orchestrate.graph import Kind, Stage
from hpc_rl.run.workspace import Workspace


def submission_name(config: Config, stage: Stage, number: int) -> str:
    """A job name that is unique to one submission and tells people which: `lewis-r01-sample-a1-3f9c2d`."""
    return f"{config.run.name}-r{stage.round:02d}-{stage.name}-a{number}-{secrets.token_hex(3)}"


def task_count(config: Config, stage: Stage) -> int:
    """Array elements of a stage: the tasks that share its shards, never more than there are; a service's replicas."""
    tasks = config.stage(stage.name).tasks
    if stage.kind is Kind.SERVICE:
        return tasks
    return min(tasks, stage.shards) if stage.kind is Kind.ARRAY else 1


def build_request(
    ws: Workspace,
    config: Config,
    stage: Stage,
    name: str,
    executor: str,
    code: Path,
    after_end: tuple[str, ...] = (),
    after_start: tuple[str, ...] = (),
    companion: bool = False,
    delay_s: float = 0.0,
) -> JobRequest:
    """The request for one attempt at a stage.

    Parameters
    ----------
    name, executor
        Name of the submission, and which executor will get it.
    code
        Folder of the code snapshot.
    after_end, after_start
        Ids of jobs to wait for.
    companion
        It runs beside another one, in whose job it is.
    delay_s
        How long it must not start.
    """
    wanted = config.stage(stage.name)
    early_s = wanted.signal_delay_s or config.cluster.signal_delay_s
    grace_s = max(10.0, early_s - max(10.0, 0.1 * early_s))  # what is left is for the end record and the requeue
    # -P: the code that PYTHONPATH names, not that in the folder of the launch (python(1)). Unlike PYTHONSAFEPATH it
    # does not concern the programs that a body starts in turn, such as a script with modules beside it
    body = [*_interpreter(config, stage), "-P", "-m", stage.job]
    body += ["--workspace", str(ws.root), "--round", str(stage.round)]
    if stage.job != f"jobs.{stage.name}":
        body += ["--stage", stage.name]
    environment = {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(wanted.cpus_per_task),
        # idle threads that spin, as OpenMP's do by default, starve the other jobs of a CPU node
        **({} if wanted.gpus_per_node else {"OMP_WAIT_POLICY": "PASSIVE"}),
        "HPC_RL_CODE": code.name,
        "HPC_RL_GRACE_S": f"{grace_s:g}",
        **wanted.env,
    }
    spec = Spec(
        name=name,
        workspace=str(ws.root),
        round=stage.round,
        stage=stage.name,
        shards=stage.shards,
        executor=executor,
        body=tuple(body),
        environment=environment,
        companion=companion,
        service=stage.kind is Kind.SERVICE,
        grace_s=grace_s,
        gpus=wanted.gpus_per_node / wanted.ranks,
        time_limit_s=60.0 * wanted.time_min if executor == "slurm" else None,
        warning_s=early_s + SIGNAL_EARLY_S,
    )
    resources = Resources(
        nodes=wanted.nodes,
        ranks_per_node=wanted.ranks,
        tasks=task_count(config, stage),
        gpus_per_node=wanted.gpus_per_node,
        cpus_per_task=wanted.cpus_per_task,
        mem_gb=wanted.mem_gb,
        time_min=wanted.time_min,
        partition=wanted.partition,
        account=wanted.account,
        qos=wanted.qos,
        constraint=wanted.constraint,
        signal_delay_s=early_s,
        setup=wanted.setup or (),
        sbatch=wanted.sbatch,
    )
    return JobRequest(spec, stage.kind, resources, code, after_end, after_start, delay_s=delay_s)


def _interpreter(config: Config, stage: Stage) -> list[str]:
    """What runs the body: the stage's or the site's container and interpreter, else our own.

    Advance calls sbatch and writes our interpreter into the next jobs' scripts, so it stays outside of the site's
    container, where there is no Slurm, unless the config gives it one by name (`stages.advance`).
    """
    own = config.stages.get(stage.name) if stage.kind is Kind.CONTROL else None
    wanted = config.stage(stage.name)
    if stage.kind is Kind.CONTROL:
        return [*((own.container if own else None) or ()), str((own.python if own else None) or sys.executable)]
    return [*(wanted.container or ()), str(wanted.python or sys.executable)]
