"""What setup.cfg installs without extras is all that a login node imports: commands, plans of every recipe."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

from hpc_rl.config.loader import RECIPES
from hpc_rl.run.code import source_root

ROOT = source_root()
COMMANDS = (
    "cancel", "doctor", "interactive", "launch", "orchestrate.round_plan", "report", "status",
)  # fmt: skip
PROBE = f"""
import contextlib, importlib, io, json, sys
from importlib import metadata
before = set(sys.modules)
for name in {[f"hpc_rl.{name}" for name in COMMANDS] + ["jobs.advance"]!r}:
    importlib.import_module(name)
from hpc_rl.launch import main
with contextlib.redirect_stdout(io.StringIO()):
    for name in sys.argv[1:]:
        assert main([name, "--dry-run", "--executor", "slurm"]) == 0
of = metadata.packages_distributions()
found = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted({{d for name in found for d in of.get(name, ())}})))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_what_they_need(names: set[str]) -> set[str]:
    """Distributions and all that they require, extras aside."""
    known: set[str] = set()
    todo = {canonical(name) for name in names}
    while todo:
        name = todo.pop()
        known.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo |= {canonical(requirement.name)} - known
    return known


def test_a_login_node_needs_no_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    base = with_what_they_need({Requirement(line).name for line in lines}) | {"hpc-rl"}
    configs = [f"configs/{name}.yaml" for name in RECIPES]
    said = subprocess.run([sys.executable, "-c", PROBE, *configs], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {canonical(name) for name in json.loads(said.stdout)}
    assert "pydantic" in imported
    assert imported - base - {"setuptools"} == set()
