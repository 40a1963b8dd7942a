"""docs/training.md: its algorithms are all there are, and the columns, fields and snippets that it names are real."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import yaml

from hpc_rl.config import training as sections
from hpc_rl.config.schema import StageConfig
from hpc_rl.training.algorithms import MODULES
from hpc_rl.training.data import pairs, solutions, store, texts
from hpc_rl.training.task import TrainTask

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "training.md").read_text()


def part(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """Cells of the first table of a part, without its head."""
    rows = re.search(r"(?:^\|.*\n)+", part(title), re.M)
    assert rows
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in rows[0].splitlines()[2:]]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z]\w*)`", text))


def test_the_algorithms_are_all_and_have_their_config_classes() -> None:
    rows = table("Algorithms")
    assert set().union(*(named(row[0]) for row in rows)) == set(MODULES)
    for *_, section in rows:
        if section != "as above":
            assert issubclass(getattr(sections, section.strip("`")), sections.TrainConfig)


def test_the_columns_are_those_that_are_read() -> None:
    found = {data: named(columns) - {"score", "weighted_sft", "reward_PART"} for data, columns in table("Data")}
    read = {
        "texts": {*texts.SCHEMA.names, "prompt", "completion", "weight"},
        "pairs": {*pairs.SCHEMA.names, "prompt", "chosen", "rejected", pairs.ROW},
        "solutions": {*solutions.SCHEMA.names, "question", "solution", "label"},
        "graded samples": {*store.READ},
    }
    assert found == read


def test_the_fields_of_the_config_are_some() -> None:
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])  # type: ignore[index]
    assert set(shown["train"]) <= set(sections.GrpoTrainConfig.model_fields)
    assert set(shown["stages"]["train"]) <= set(StageConfig.model_fields)
    every = set[str]().union(
        *(set(c.model_fields) for c in vars(sections).values() if isinstance(c, type) and hasattr(c, "model_fields"))
    )
    for title in ("A step", "Launch", "Checkpoints, and what a kill costs", "When memory runs out", "What comes out"):
        said = {word for word in named(part(title)) if "_" in word}
        assert said <= every | {"trained_on", "memory_notches", "log_dir"}, (title, said - every)


def test_the_snippet_names_fields_of_a_task() -> None:
    snippet = re.search(r"TrainTask\((.*?)\n    \)", PAGE, re.S)
    assert snippet
    assert set(re.findall(r"(\w+)=", snippet[1])) <= {field.name for field in fields(TrainTask)}
