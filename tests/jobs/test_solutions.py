"""Reference solutions as answers of the solver: which are taken, and with which tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.config.prosetting import SolverConfig
from hpc_rl.data.questions import Question
from hpc_rl.engines.loading import load_processor
from hpc_rl.run.code import source_root
from jobs.prosetting.solutions import Solutions

QUESTION = Question("q1", "11+11=", "220", "220", "q1", None, 0, "", "train", "initial")
PROMPT = [{"role": "user", "content": "11+11="}]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
EMPTY_THOUGHTS = """{% for m in messages %}{% if m['role'] == 'assistant' and think is not defined %}00{% endif %}\
{{ m['content'] }}{% endfor %}"""
OTHERWISE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}+{% endif %}"


def solver(folder: Path, template: str, **more: Any) -> SolverConfig:
    """The tiny solver with another chat template."""
    shutil.copytree(source_root() / "models/tiny-solver", folder)
    (folder / "chat_template.jinja").write_text(template)
    return SolverConfig.model_validate({"path": str(folder), **more})


@pytest.mark.parametrize(
    ("template", "variables", "shown"),
    [(PLAIN, {}, "220"), (EMPTY_THOUGHTS, {}, "00220"), (EMPTY_THOUGHTS, {"think": False}, "220")],
)
def test_the_tokens_are_what_the_template_shows_behind_the_prompt(
    tmp_path: Path, template: str, variables: dict[str, Any], shown: str
) -> None:
    """Thoughts that a template puts before an answer belong to it; its variables are the solver's."""
    made = Solutions(True, "text", solver(tmp_path / "m", template, chat_template_kwargs=variables))(QUESTION, PROMPT)
    assert made is not None and made.text == "220"
    assert load_processor(tmp_path / "m").decode(made.token_ids).replace(" ", "") == shown


def test_what_the_template_does_not_show_as_an_answer_is_counted_and_not_chosen_s5(tmp_path: Path) -> None:
    """S5: found out now, and not when the solver is first trained."""
    solutions = Solutions(True, "text", solver(tmp_path / "m", OTHERWISE))
    assert solutions(QUESTION, PROMPT) is None
    assert solutions.counts["unusable_reference_solution"] == 1
