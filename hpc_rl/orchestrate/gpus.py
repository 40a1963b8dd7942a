"""GPUs of one machine against what stages hold at once: a stage with the services that must be up while it runs.

A stage that asks a service on the machine's only GPU would wait for ever: the service stays up until the stage is done.
"""

from __future__ import annotations

from hpc_rl.config.errors import Problem
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Graph, StageId
from hpc_rl.orchestrate.requests import task_count

Names = tuple[str, ...]


def gpus_at_once(config: Config, graph: Graph) -> dict[Names, int]:
    """GPUs of one task of each stage and all replicas of the services that it asks, by the names of all these."""

    def of_task(name: str) -> int:
        options = config.stage(name)
        return options.gpus_per_node * options.nodes

    def of_service(id: StageId) -> int:
        return task_count(config, graph[id]) * of_task(id.name)

    found = {}
    for stage in graph.stages:
        services = [id for id in (*stage.uses, *stage.beside) if of_task(id.name)]
        names = (stage.name, *(id.name for id in services))
        found[names] = of_task(stage.name) + sum(map(of_service, services))
    return found


def gpu_problems(config: Config, graph: Graph, have: int) -> list[Problem]:
    """Stages for which a machine has too few GPUs; none for a machine that has none, where all work on the CPU."""
    asked = gpus_at_once(config, graph)
    alone = {names for names, gpus in asked.items() if len(names) == 1 and gpus > have}
    found = []
    for names, gpus in asked.items():
        if not have or gpus <= have or any((name,) in alone for name in names[1:]):
            continue
        first, field = names[0], f"stages.{names[-1]}.gpus_per_node"
        if len(names) == 1:
            options = config.stage(first)
            fields = {"gpus_per_node": have, "nodes": 1}
            if (options.ranks_per_node or 0) > have:
                fields["ranks_per_node"] = have
            way_out = " ".join(f"--set stages.{first}.{name}={value}" for name, value in fields.items())
            found.append(Problem(field, f"{first} asks for {gpus} GPUs, and this machine has {have}", way_out=way_out))
        else:
            what = f"{' and '.join(names)} hold {gpus} GPUs at the same time, and this machine has {have}"
            services = ", ".join(f"services.{name.rpartition('.')[2]}.client.url" for name in names[1:])
            way_out = (
                f"--set {field}=0, where it can work on the CPU; or give each fewer; or let the service run elsewhere "
                f"({services})"
            )
            found.append(Problem(field, what, way_out=way_out))
    return found
