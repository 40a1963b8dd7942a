"""The cluster against what stages ask for: partitions, their nodes and limits, accounts; and what sbatch says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hpc_rl.cluster import queries
from hpc_rl.cluster.base import ExecutorError
from hpc_rl.cluster.choose import make_executor, slurm_problems
from hpc_rl.config.schema import StageConfig
from hpc_rl.health.findings import Finding, Subject, of_problem
from hpc_rl.orchestrate.graph import Kind, Stage
from hpc_rl.orchestrate.requests import build_request, task_count
from hpc_rl.run.workspace import Workspace

AREA = "Slurm"
FORMAT = "%P|%a|%D|%c|%m|%G|%f|%l"
"""Partition (* = default), up or down, nodes, their CPUs, MB, GPUs, features, time limit: a line for nodes that are
alike (sinfo(1))."""
SINFO = ("sinfo", "--noheader", "--exact", "--noconvert", f"--format={FORMAT}")
"""Without `--exact` nodes of one state that differ are one line with the least of each, `64000+`."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike. `time_min` is None where there is no limit."""

    partition: str
    is_default: bool
    is_up: bool
    count: int
    cpus: int
    memory_mb: int
    gpus: int
    features: frozenset[str]
    time_min: int | None


def slurm(subject: Subject) -> Iterator[Finding]:
    """Every stage's resources against the partitions; without `--quick` accounts, and sbatch's own opinion."""
    if shutil.which("sbatch") is None:
        remedy = "run on a login node of the cluster, or take --executor local (or debug)"
        yield Finding(AREA, "problem", "cluster.executor is slurm, but there is no sbatch on the PATH", remedy)
        return
    try:
        groups = read_sinfo(_ask(SINFO, subject.patience_s))
    except ExecutorError as error:
        yield Finding(AREA, "problem", str(error), "see whether the controller is up (scontrol ping), and ask again")
        return
    yield Finding(AREA, "ok", f"it answers: {len({nodes.partition for nodes in groups})} partitions")
    shapes = [stage for stage in _first_of_each(subject) if stage.kind is not Kind.CONTROL or _has_control(subject)]
    wrong: set[str] = set()
    for stage in shapes:
        for finding in fits(stage.name, subject.config.stage(stage.name), groups):
            wrong.add(stage.name)
            yield finding
    if subject.quick:
        return
    problems = [p for p in slurm_problems(subject.config) if not p.field.endswith("partition")]  # seen above
    for problem in problems:
        yield of_problem(AREA, problem)
    yield from _arrays(subject, shapes)
    yield from _sbatch(subject, [stage for stage in shapes if stage.name not in wrong])


def read_sinfo(text: str) -> list[Nodes]:
    """What `sinfo --format=FORMAT` printed."""
    found = []
    for line in text.splitlines():
        parts = line.strip().split("|")
        if len(parts) == 8:
            name, up, count, cpus, memory, gres, features, limit = parts
            found.append(
                Nodes(
                    partition=name.rstrip("*"),
                    is_default=name.endswith("*"),
                    is_up=up == "up",
                    count=_number(count),
                    cpus=_number(cpus),
                    memory_mb=_number(memory),
                    gpus=_gpus(gres),
                    features=frozenset(features.split(",")),
                    time_min=minutes(limit),
                )
            )
    return found


def fits(name: str, wanted: StageConfig, groups: Sequence[Nodes]) -> Iterator[Finding]:
    """What of a stage's resources no partition that it may run in has."""
    names = [part for part in (wanted.partition or "").split(",") if part]
    mine = [nodes for nodes in groups if (nodes.partition in names if names else nodes.is_default)]
    known = {nodes.partition for nodes in groups}
    for missing in set(names) - known:
        what = f"stages.{name}: Slurm has no partition {missing!r}"
        yield Finding(AREA, "problem", what, f"one of {', '.join(sorted(known))} (`sinfo` lists them)")
    if not mine:
        if not names:
            remedy = "set cluster.partition"
            yield Finding(AREA, "problem", f"stages.{name} names no partition, and Slurm has no default", remedy)
        return
    where = f"partition {', '.join(dict.fromkeys(nodes.partition for nodes in mine))}"
    if not any(nodes.is_up for nodes in mine):
        yield Finding(AREA, "problem", f"stages.{name}: {where} is not up", "another partition, or wait")
        return
    cpus = wanted.ranks * wanted.cpus_per_task
    plain = wanted.constraint if wanted.constraint and re.fullmatch(r"[\w.-]+", wanted.constraint) else None
    asked: dict[str, tuple[object, str, Callable[[Nodes], bool]]] = {
        "gpus_per_node": (wanted.gpus_per_node, "GPUs a node", lambda n: n.gpus >= wanted.gpus_per_node),
        "cpus_per_task": (cpus, "CPUs a node (ranks × cpus_per_task)", lambda n: n.cpus >= cpus),
        "mem_gb": (wanted.mem_gb, "GiB a node", lambda n: n.memory_mb >= 1024 * (wanted.mem_gb or 0)),
        "constraint": (plain, "as a feature", lambda n: plain is None or plain in n.features),
        "time_min": (wanted.time_min, "minutes", lambda n: n.time_min is None or n.time_min >= wanted.time_min),
    }
    having = list(mine)
    for field, (value, unit, has) in asked.items():
        left = [nodes for nodes in having if has(nodes)]
        if not left:
            what = f"stages.{name}.{field}: no node of {where} has {value} {unit}"
            also = " together with what the stage asks for besides" if having != mine else ""
            yield Finding(AREA, "problem", what + also, f"lower stages.{name}.{field}, or choose another partition")
            return
        having = left
    if sum(nodes.count for nodes in having) < wanted.nodes:
        what = f"stages.{name}.nodes is {wanted.nodes}, and {where} has {sum(n.count for n in having)} that fit"
        yield Finding(AREA, "problem", what, f"lower stages.{name}.nodes, or choose another partition")


def minutes(limit: str) -> int | None:
    """A time limit as sinfo writes it, `days-hours:minutes:seconds`, in minutes; None where there is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())
    if match is None:
        return None
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + mins


def _number(text: str) -> int:
    """`256000+`, the least of nodes that differ, is 256000."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def _gpus(gres: str) -> int:
    """GPUs in `gpu:a100:8(S:0-1),gpu:h100:4,nvme:1`; `gpu` alone is one, as in `gpu:a100`."""
    total = 0
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = part.split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def _first_of_each(subject: Subject) -> list[Stage]:
    """Each stage by name once, as in the first round that has it."""
    return list({stage.name: stage for stage in reversed(subject.graph.stages)}.values())[::-1]


def _has_control(subject: Subject) -> bool:
    return subject.config.cluster.advance == "jobs"


def _arrays(subject: Subject, stages: Sequence[Stage]) -> Iterator[Finding]:
    limit = subject.config.cluster.max_array_size or queries.max_array_size() - 1
    for stage in stages:
        if (tasks := task_count(subject.config, stage)) > limit:
            yield Finding(AREA, "ok", f"stages.{stage.name}: {tasks} tasks become {-(-tasks // limit)} arrays")


def _sbatch(subject: Subject, stages: Sequence[Stage]) -> Iterator[Finding]:
    """`sbatch --test-only`: the script of each stage is looked at as if it were submitted, and nothing is (sbatch(1)).

    Stages that ask for the same are one question; a heterogeneous job cannot be asked about.
    """
    config, ws = subject.config, Workspace(subject.config.run.workspace)
    executor = make_executor(config, "slurm")
    asked: dict[str, tuple[str, str]] = {}
    alone = [stage for stage in stages if not (stage.beside or stage.id in subject.graph.companions)]
    for stage in alone:
        request = build_request(ws, config, stage, f"{config.run.name}-{stage.name}", "slurm", ws.code_dir)
        asked.setdefault(repr(request.resources), (stage.name, executor.render(request)[0]))
    refused = 0
    for name, script in asked.values():
        try:
            _ask(["sbatch", "--test-only"], subject.patience_s, script)
        except ExecutorError as error:
            refused += 1
            yield Finding(AREA, "problem", f"stages.{name}: {error}", "correct the stage's resources, or cluster's")
    if asked and not refused:
        yield Finding(AREA, "ok", f"sbatch would take the jobs of {len(alone)} stages (--test-only)")


def _ask(command: Sequence[str], patience_s: float, script: str = "") -> str:
    """A command of Slurm's, once: who asks wants to know how it is now. Raises ExecutorError with what it says."""
    try:
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, env=queries.clean_environment(),
            timeout=patience_s, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ExecutorError(f"{command[0]} is not on the PATH") from error
    except subprocess.TimeoutExpired as error:
        raise ExecutorError(f"`{' '.join(command)}` has not answered within {patience_s:g} s") from error
    if done.returncode:
        raise ExecutorError(f"`{' '.join(command[:2])}`: {(done.stderr or done.stdout).strip()}")
    return done.stdout
