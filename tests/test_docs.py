"""What the documents name exists: files behind links, modules behind `python -m`, configs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])


@each_document
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [file for file in files if not (document.parent / file).exists()] == []


@each_document
def test_every_module_that_is_run_exists(document: Path) -> None:
    modules = set(re.findall(r"python3? -m ([a-z_]\w*(?:\.\w+)*)", document.read_text()))
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


@each_document
def test_every_file_of_the_repository_that_is_named_exists(document: Path) -> None:
    folders = "configs|slurm_templates|jobs|hpc_rl|benchmarks|tools|models|tests"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", document.read_text())
    # capitals stand for a name of the reader's own: configs/cluster/YOURS.yaml
    files = {name for name in named if not re.search(r"/[A-Z]", name)}
    assert [name for name in sorted(files) if not (REPOSITORY / name).exists()] == []


def test_links_and_modules_are_really_found() -> None:
    readme = DOCUMENTS[0].read_text()
    assert "(docs/templates.md)" in readme and "python -m hpc_rl.launch" in readme and "configs/lewis.yaml" in readme
