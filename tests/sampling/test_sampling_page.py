"""docs/sampling.md to the letter: its example draws as it says, its config is one, the fields it names are there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.phases import SampleConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "sampling.md").read_text()


def test_the_example_draws_until_two_answers_are_accepted(tmp_path: Path) -> None:
    (script,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "KAccepted(" in text]
    script, found = re.subn(r'EngineSpec\("auto"', 'EngineSpec("transformers"', script)
    assert found == 1
    program = tmp_path / "example.py"
    program.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, str(program)], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    *drawn, last = ended.stdout.splitlines()
    tally = ast.literal_eval(last)
    lines = [line for line in drawn if re.match(r"q[01]-g\d (stop|length) ", line)]
    attempts = sum(int(tries) * tasks for tries, tasks in tally["tries"]["writer"].items())
    assert attempts == len(lines) >= 4 and sum(tally["tries"]["writer"].values()) == 2
    accepted = sum(line.endswith("</detailed>") for line in lines)
    assert tally["accepted"] == {"writer": accepted}
    exhausted = tally["exhausted"]["writer"]
    assert accepted == 4 if exhausted == 0 else accepted < 4 and "6" in tally["tries"]["writer"]


def test_the_config_of_the_page_is_one(tmp_path: Path) -> None:
    block = re.findall(r"(?:^    .*\n)+", PAGE, flags=re.M)[0]
    file = tmp_path / "page.yaml"
    shown = yaml.safe_load(block)
    file.write_text(yaml.safe_dump({"extends": str(REPOSITORY / "configs/lewis.yaml"), **shown}))
    config = configs.load(file, [], {}, tmp_path / "run", cwd=REPOSITORY)
    assert isinstance(config, LewisConfig)
    assert {name: getattr(config.sample, name) for name in shown["sample"]} == shown["sample"]
    assert config.sample.prompts_per_round // config.sample.shard_size == 64


def test_the_fields_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`sample\.(\w+)", PAGE))
    assert named and named <= set(SampleConfig.model_fields), named - set(SampleConfig.model_fields)
