"""What runs on a login node stays light: commands import no framework, planning opens no large file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.run.code import source_root

ROOT = source_root()
HEAVY = [
    "torch",
    "transformers",
    "vllm",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "pyarrow",
    "numpy",
    "scipy",
]

CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")]
    if path.parent.name != "cluster"  # profiles that runs extend
)

DRY_RUN = """
import json, sys
from hpc_rl.launch import main
code = main([sys.argv[1], "--dry-run", "--verbose", "--executor", sys.argv[2]])
print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("executor", ["slurm", "local"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_dry_run_of_every_shipped_config_imports_no_framework(config: str, executor: str) -> None:
    planned = subprocess.run(
        [sys.executable, "-c", DRY_RUN, config, executor], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0, planned.stderr
    code, modules = json.loads(planned.stdout.splitlines()[-1])
    assert code == 0
    assert set(modules) & set(HEAVY) == set()
    assert "nothing was submitted or written" in planned.stdout


@pytest.mark.parametrize(
    "module",
    [
        "hpc_rl.launch",
        "hpc_rl.status",
        "hpc_rl.cancel",
        "hpc_rl.report",
        "hpc_rl.doctor",
        "jobs.advance",
        "hpc_rl.cluster.slurm",
    ],
)
def test_a_command_for_the_login_node_imports_no_framework(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in json.loads(imported.stdout)} & set(HEAVY) == set()


def test_there_are_configs_to_look_at() -> None:
    assert {"configs/lewis.yaml", "configs/tiny/lewis.yaml", "benchmarks/noop.yaml"} <= set(CONFIGS)
    assert all(Path(ROOT, config).is_file() for config in CONFIGS)


@pytest.mark.parametrize("module", ["hpc_rl.services.client", "hpc_rl.services.reward_model_client"])
def test_who_asks_a_service_needs_nothing_that_serves(module: str) -> None:
    """A stage's environment has the packages of its own extra only."""
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & {"fastapi", "uvicorn", "prometheus_client", "torch"} == set()
