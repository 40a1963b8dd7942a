"""ProSetting asks the services that its settings say, and no others (S2–S4)."""

from __future__ import annotations

import pytest

from hpc_rl.config.prosetting import ProSettingConfig

CONFIG = {
    "recipe": "prosetting",
    "run": {"name": "t", "workspace": "/nowhere/t"},
    "solver": {"path": "models/tiny-solver"},
    "questions": {"file": "configs/tiny/sums.json"},
}


@pytest.mark.parametrize(
    ("grade", "teacher", "asked"),
    [
        ({}, "teacher", {"grade.teacher", "enhance.teacher"}),
        ({"judge": "never"}, "enhancer", {"grade.teacher", "enhance.enhancer"}),
        ({"check_references": False}, "enhancer", {"grade.teacher", "enhance.enhancer"}),
        ({"judge": "never", "check_references": False}, "enhancer", {"enhance.enhancer"}),
    ],
)
def test_grading_has_a_teacher_where_one_judges_or_checks_references(
    grade: dict[str, object], teacher: str, asked: set[str]
) -> None:
    config = ProSettingConfig.model_validate({**CONFIG, "grade": grade, "enhance": {"teacher": teacher}})
    assert config.service_stages == asked
    problems = {problem.field: problem for problem in config.file_problems(rows=False)}
    assert set(problems) == {f"services.{stage.partition('.')[2]}" for stage in asked}
    if teacher == "enhancer":
        assert "enhance.teacher: teacher" in str(problems["services.enhancer"])
