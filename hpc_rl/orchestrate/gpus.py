"""GPUs of one machine against what stages hold at once: a stage with the services that must be up while it runs.

A stage that asks a service on the machine's only GPU would wait for ever: the service stays up until the stage is done.
Looked at is each stage by itself, not what two of them and their services hold at the same time.
"""

from __future__ import annotations

from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Graph, StageId
from hpc_rl.orchestrate.requests import task_count

Names = tuple[str, ...]


def gpus_at_once(config: Config, graph: Graph) -> dict[Names, int]:
    """GPUs of a task of each stage, by its name; and, where it asks services, of it and all their replicas together."""

    def of_task(name: str) -> int:
        options = config.stage(name)
        return options.gpus_per_node * options.nodes

    def of_service(id: StageId) -> int:
        return task_count(config, graph[id]) * of_task(id.name)

    found: dict[Names, int] = {}
    for stage in graph.stages:
        found[(stage.name,)] = own = of_task(stage.name)
        services = [id for id in (*stage.uses, *stage.beside) if of_task(id.name)]
        if own and services:  # without GPUs it starts as soon as one replica has started
            found[(stage.name, *(id.name for id in services))] = own + sum(map(of_service, services))
    return found


def gpu_problems(config: Config, graph: Graph, have: int) -> list[Problem]:
    """Stages for which a machine has too few GPUs; none for a machine that has none, where all work on the CPU."""
    too_many = {names: gpus for names, gpus in gpus_at_once(config, graph).items() if have and gpus > have}
    alone = {name for name, *services in too_many if not services}
    found = []
    for names, gpus in too_many.items():
        first, *services = names
        if not services:
            options = config.stage(first)
            fields = {"gpus_per_node": have, "nodes": 1}
            if (options.ranks_per_node or 0) > have:
                fields["ranks_per_node"] = have
            field, what = f"stages.{first}.gpus_per_node", f"{first} asks for {gpus} GPUs, and this machine has {have}"
            way_out = " ".join(f"--set stages.{first}.{name}={value}" for name, value in fields.items())
            found.append(Problem(field, what, way_out=way_out))
        elif not alone.intersection(names):
            field = f"stages.{services[-1]}.gpus_per_node"
            what = f"{' and '.join(names)} hold {gpus} GPUs at the same time, and this machine has {have}"
            elsewhere = ", ".join(f"services.{name.rpartition('.')[2]}.client.url" for name in services)
            way_out = (
                f"--set {field}=0, where it can work on the CPU; or give each fewer (gpus_per_node; tasks are replicas "
                f"of a service); or let the service run elsewhere ({elsewhere})"
            )
            found.append(Problem(field, what, way_out=way_out))
    return found
