"""What `--dry-run` prints: rounds, stages, dependencies, resources, and with -v the exact scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.base import Resources
from hpc_rl.cluster.choose import make_executor
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate.graph import Graph, Kind, Stage, StageId
from hpc_rl.orchestrate.requests import build_request
from hpc_rl.run.workspace import Workspace


def commands(root: Path) -> str:
    """What to type to see how a run goes."""
    return (
        f"status:      python -m hpc_rl.status {root}\n"
        f"report:      python -m hpc_rl.report {root}\n"
        f"TensorBoard: tensorboard --logdir {root / 'tb'}\n"
        f"cancel:      python -m hpc_rl.cancel {root}"
    )


def show(config: Config, executor: str, scripts: bool) -> None:
    """Print the plan of a run. Nothing is written and no scheduler is asked."""
    graph, ws = recipes.graph_of(config), Workspace(config.run.workspace)
    print(f"run {config.run.name}: recipe {config.recipe}, {config.run.rounds} rounds, executor {executor}")
    print(f"workspace {ws.root}\nconfig hash {configs.config_hash(config)[:12]}\n")
    repeats = _repeats_of_round_1(graph)
    control = executor == "slurm" and config.cluster.advance == "jobs"
    for number in range(graph.rounds + 2):
        if number in repeats:
            continue
        shown = [stage for stage in graph.of_round(number) if stage.kind is not Kind.CONTROL or control]
        if not shown:
            continue
        title = f"round {number}" if number <= graph.rounds else "after the last round"
        print(f"{title}{f' (and {len(repeats)} more like it)' if number == 1 and repeats else ''}")
        for stage in shown:
            print(_line(config, ws, executor, stage))
        print()
    if scripts:
        backend = make_executor(config, executor)
        for stage in graph.stages:
            if stage.round in repeats or stage.id in graph.companions or (stage.kind is Kind.CONTROL and not control):
                continue
            request, *beside = [
                build_request(
                    ws,
                    config,
                    part,
                    f"{config.run.name}-r{part.round:02d}-{part.name}-a1-UNIQUE",
                    executor,
                    ws.code_dir / "HASH",
                )
                for part in (stage, *map(graph.__getitem__, stage.beside))
            ]
            request = replace(
                request,
                after_end=_placeholders(need for need in stage.needs if need.round >= stage.round - 1),
                after_start=_placeholders(stage.uses),
                beside=tuple(beside),
            )
            for script in backend.render(request):
                print(f"--- {stage.id} ---\n{script}\n")
    print("nothing was submitted or written.")


def _placeholders(stages: Iterable[StageId]) -> tuple[str, ...]:
    """What stands for the job ids that only the scheduler can give."""
    return tuple(f"ID[{stage}]".replace(" ", "_") for stage in stages)


def _repeats_of_round_1(graph: Graph) -> set[int]:
    """Rounds that have round 1's stages with the same edges among them: shown once."""

    def shape(number: int) -> list[tuple[object, ...]]:
        return [
            (s.name, s.job, s.kind, s.shards, [n.name for n in (*s.needs, *s.uses, *s.beside) if n.round == number])
            for s in graph.of_round(number)
        ]

    return {number for number in range(2, graph.rounds + 1) if shape(number) == shape(1)}


def _line(config: Config, ws: Workspace, executor: str, stage: Stage) -> str:
    resources = build_request(ws, config, stage, "-", executor, ws.code_dir).resources
    after = [need.name if need.round == stage.round else str(need) for need in stage.needs]
    after += [f"start of {used.name}" for used in stage.uses]
    together = f", one job with {', '.join(id.name for id in stage.beside)}" if stage.beside else ""
    work = f"{stage.shards} shards" if stage.has_work and stage.shards > 1 else ""
    what = f"  {stage.name:<20} {stage.kind.value:<11} {_ask(resources):<58} {work:<11}"
    return f"{what} after {', '.join(after) or 'nothing'}{together}"


def _ask(r: Resources) -> str:
    parts = [
        f"{r.tasks} tasks ×" if r.tasks > 1 else "",
        f"{r.nodes} node{'s' * (r.nodes > 1)}",
        f"{r.ranks_per_node} rank{'s' * (r.ranks_per_node > 1)}",
    ]
    parts += [
        f"{r.gpus_per_node} GPU{'s' * (r.gpus_per_node > 1)}" if r.gpus_per_node else "",
        f"{r.cpus_per_task} CPU",
    ]
    parts += [f"{r.mem_gb:g} GB" if r.mem_gb else "", f"{r.time_min} min", r.partition or ""]
    return " ".join(part for part in parts if part)
