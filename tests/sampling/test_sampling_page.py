"""docs/sampling.md to the letter: its examples do what it says, its configs are some, the fields it names are there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from hpc_rl.config.phases import SampleConfig
from hpc_rl.config.prosetting import CollectConfig
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.grading.samples import Sample
from hpc_rl.orchestrate import job as jobs
from hpc_rl.orchestrate.job import Job
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.sampling.stream import Ending
from tests.orchestrate.shards_recipe import SHARDS
from tests.sampling.letters_task import published, stream
from tools import tiny_chat_model

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "sampling.md").read_text()


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


def script(with_: str) -> str:
    """The page's only script with these words."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if with_ in text]
    return str(found)


def run_script(text: str, folder: Path) -> str:
    """What it prints, run as the page's reader would."""
    program = folder / "example.py"
    program.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, str(program)], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.parametrize(
    "engine", ["transformers", pytest.param("auto", marks=[needs_vllm, pytest.mark.slow], id="as it is, with vLLM")]
)
def test_the_example_draws_until_two_answers_are_accepted(tmp_path: Path, engine: str) -> None:
    text, found = re.subn(r'EngineSpec\("auto"', f'EngineSpec("{engine}"', script("TaskQueue("))
    assert found == 1
    printed = run_script(text, tmp_path).splitlines()
    last, drawn = printed[-1], printed[:-1]  # vLLM prints lines of its own before
    tally = ast.literal_eval(last)
    lines = [line for line in drawn if re.match(r"q[01]-g\d (stop|length) ", line)]
    attempts = sum(int(tries) * tasks for tries, tasks in tally["tries"]["writer"].items())
    assert attempts == len(lines) >= 4 and sum(tally["tries"]["writer"].values()) == 2
    accepted = sum(line.endswith("</detailed>") for line in lines)
    assert tally["accepted"] == {"writer": accepted}
    exhausted = tally["exhausted"]["writer"]
    assert accepted == 4 if exhausted == 0 else accepted < 4 and "6" in tally["tries"]["writer"]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Job, list[Sample]]:
    """The source of the page, the job of a task that sampled for it with a tiny model, and its samples."""
    names: dict[str, Any] = {}
    exec(script("VariedGroup("), names)
    folder = tmp_path_factory.mktemp("letters")
    file = folder / "letters.yaml"
    file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: letters, rounds: 1}\n")
    run = open_run(configs.load(file, (), {}, folder / "run", cwd=folder), file)
    job = jobs.load(run.ws.root, 1, "cut")
    engine = TransformersEngine(str(tiny_chat_model.write(folder / "model", seed=2)), max_num_seqs=16)
    with ExitStack() as stack:
        assert stream(job, stack, engine, source=names["Letters"](round=1)).run() is Ending.DONE
    return names["Letters"], job, published(job)


def test_the_rules_of_the_page_keep_what_it_says(letters: tuple[Any, Job, list[Sample]]) -> None:
    source, _, samples = letters
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


def test_other_rounds_of_the_rules_of_the_page_have_other_samples(letters: tuple[Any, Job, list[Sample]]) -> None:
    source = letters[0]
    first, second = ({task.id for task in source(round).tasks(3)} for round in (1, 2))
    assert len(first) == len(second) == len(source.rules) and not first & second


def test_samples_lie_where_the_page_says_and_are_read_as_it_shows(
    letters: tuple[Any, Job, list[Sample]], tmp_path: Path
) -> None:
    _, job, samples = letters
    text = script("iter_samples(")
    for there, here in {r'Workspace\(".*"\)': f'Workspace("{job.ws.root}")', '"sample"': '"cut"'}.items():
        text, found = re.subn(there, here, text)
        assert found
    lines = "".join(f"{s.sample_id} {s.attempt} {s.accepted} {s.text}\n" for s in samples)
    assert run_script(text, tmp_path) == re.sub("\r\n?", "\n", lines)  # as a pipe of text is read
    (name,) = set(re.findall(r"`rounds/round_NN/sample/(shard_\S+)`", PAGE))
    files = list(job.ws.root.glob("rounds/round_01/cut/" + name.replace("NNNN", "0007").replace("<token>", "*")))
    assert files == [manifest.read(job.ws, 1, "cut", 7).path("samples.parquet")]
    (columns,) = re.findall(r"with the columns (.*?) \(", PAGE)
    assert re.findall(r"`(\w+)`", columns) == [field.name for field in fields(Sample)]


BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["tasks of one engine", "one task of eight"])
def test_the_configs_of_the_page_are_some(tmp_path: Path, block: str) -> None:
    file = tmp_path / "page.yaml"
    shown = yaml.safe_load(block)
    file.write_text(yaml.safe_dump({"extends": str(REPOSITORY / "configs/lewis.yaml"), **shown}))
    loaded = configs.load_with_places(file, [], {}, tmp_path / "run", cwd=REPOSITORY)
    config = loaded.config
    assert isinstance(config, LewisConfig) and not loaded.notes
    assert {name: getattr(config.sample, name) for name in shown["sample"]} == shown["sample"]
    assert config.sample.prompts_per_round // config.sample.shard_size == 64
    stage = config.stages["sample"]
    engines = config.sample.data_parallel_size
    assert (stage.gpus_per_node, stage.cpus_per_task, stage.mem_gb) == (engines, 8 * engines, 64 * engines)
    assert (stage.tasks or 0) * engines == 8


def test_the_lines_of_the_report_that_the_page_explains_are_its_lines() -> None:
    written = (REPOSITORY / "hpc_rl" / "sampling" / "text.py").read_text()
    lines = set(re.findall(r'_line\("([\w-]+)"', written))
    table = re.findall(r"^\| ([\w -]+) \|", PAGE.partition("## The report")[2].partition("\n## ")[0], re.M)
    assert set(table) - {"line", "each role"} == lines


def test_the_fields_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`sample\.(\w+)", PAGE))
    known = {*SampleConfig.model_fields, *CollectConfig.model_fields}
    assert named and named <= known, named - known
