"""Every message that a bad config can produce, as the user reads it: golden/NAME.yaml gives golden/NAME.txt.

After a change on purpose: `UPDATE_GOLDEN=1 pytest tests/config/test_error_messages.py`, then review the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_rl.config.errors import ConfigError
from hpc_rl.config.loader import from_json, load

GOLDEN = Path(__file__).parent / "golden"

SETTINGS = {
    "no_value": ["sample.shard_size"],
    "no_key": ["=3", "sample..shard_size=3"],
    "no_yaml": ["sample.shard_size=[", "run.name={a: 1", "run.name=*x"],
    "unknown_key": ["sample.shardsize=3", "stages.grade.listener.tsks=3", "stages.grad.tasks=2", "a.b.c.d=1"],
    "wrong_value": ["sample.shard_size=many", "run.rounds=null", "sample=3", "cluster.executor=Slurm"],
    "through_a_value": ["run.name.first=x"],
}


def compare(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(text + "\n")
    assert text + "\n" == file.read_text()


@pytest.mark.parametrize("name", sorted(file.stem for file in GOLDEN.glob("*.yaml")))
def test_message_for_a_bad_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    with pytest.raises(ConfigError) as caught:
        load(f"{name}.yaml", env={})
    compare(name, str(caught.value))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_message_for_a_bad_setting(name: str, minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(minimal, SETTINGS[name], env={}, cwd=minimal.parent)
    compare(f"set_{name}", str(caught.value).replace(f"{minimal.parent}/", ""))


def test_message_for_bad_variables(minimal: Path) -> None:
    (minimal.parent / ".env").write_text("LISTENER_TIMEOUT=soon\n")
    env = {"LISTENER_BATCH_SIZE": "0", "DEBUG_MODE": "perhaps", "WANDB_MODE": "of"}
    with pytest.raises(ConfigError) as caught:
        load(minimal, env=env, cwd=minimal.parent)
    compare("variables", str(caught.value))


def test_message_for_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("lewis.yml", env={})
    compare("missing_file", str(caught.value))


def test_message_for_a_config_in_a_workspace_of_another_version() -> None:
    with pytest.raises(ConfigError) as caught:
        from_json({"recipe": "lewis", "run": {"name": "a", "workspace": "/w", "colour": 1}}, "/w/training_config.json")
    compare("stored", str(caught.value))
