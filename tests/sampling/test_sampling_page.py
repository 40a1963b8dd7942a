"""docs/sampling.md to the letter: its example draws as it says, its config is one, the fields it names are there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.grading.samples import Sample
from hpc_rl.orchestrate import job as jobs
from hpc_rl.orchestrate.start import open_run
from hpc_rl.sampling.stream import Ending
from tests.orchestrate.shards_recipe import SHARDS
from tests.sampling.letters_task import published, stream
from tools import tiny_chat_model

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "sampling.md").read_text()


def test_the_example_draws_until_two_answers_are_accepted(tmp_path: Path) -> None:
    (script,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "TaskQueue(" in text]
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


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Sample]]:
    """The source of the page, and what a task sampled for it with a tiny model."""
    (script,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "VariedGroup(" in text]
    names: dict[str, Any] = {}
    exec(script, names)
    folder = tmp_path_factory.mktemp("letters")
    file = folder / "letters.yaml"
    file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: letters, rounds: 1}\n")
    run = open_run(configs.load(file, (), {}, folder / "run", cwd=folder), file)
    job = jobs.load(run.ws.root, 1, "cut")
    engine = TransformersEngine(str(tiny_chat_model.write(folder / "model", seed=2)), max_num_seqs=16)
    with ExitStack() as stack:
        assert stream(job, stack, engine, source=names["Letters"]()).run() is Ending.DONE
    return names["Letters"], published(job)


def test_the_rules_of_the_page_keep_what_it_says(letters: tuple[Any, list[Sample]]) -> None:
    source, samples = letters
    by_role = {role: [sample for sample in samples if sample.role == role] for role in source.rules}
    assert {sample.group for sample in by_role["student"]} == set(range(SHARDS))

    def letter(sample: Sample) -> str:
        return next(filter(str.isalpha, sample.text.lower()), "")

    helpful, sneaky = ([letter(s) for s in by_role[role] if s.accepted] for role in ("helpful", "sneaky"))
    assert helpful and all("a" <= one <= "m" for one in helpful)
    assert sneaky and all("n" <= one <= "z" for one in sneaky)
    again = 0
    for group in range(SHARDS):
        tries = [s for s in by_role["student"] if s.group == group]
        kept = [s for s in tries if s.accepted]
        again += len(tries) > 4
        assert len(tries) in (4, 8, 12) and kept in ([], tries[-4:])
        assert len({"a" <= letter(s) <= "m" for s in kept}) == (2 if kept else 0), "right ones and wrong ones"
        assert kept or len(tries) == 12
    assert 0 < again < SHARDS


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
