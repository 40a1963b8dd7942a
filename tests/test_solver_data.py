"""The benchmark of a round's data stages, at a small size: every job goes through, and nothing is lost between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.solver_data import bare, enhance, make
from benchmarks.solver_texts import KINDS, attempt, made
from hpc_rl.grading.answers import Checker
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from jobs.prosetting import dpo_data, grade, pool

QUESTIONS, ATTEMPTS, SHARDS = 40, 4, 3


def test_a_round_of_made_up_attempts_goes_through_all_data_stages(tmp_path: Path) -> None:
    make(tmp_path / "run", QUESTIONS, ATTEMPTS, SHARDS, tokens=5, kinds=["integer", "decimal", "fraction"])
    ws, arguments = Workspace(tmp_path / "run"), ["--workspace", str(tmp_path / "run"), "--round", "1"]
    assert bare(ws.root, SHARDS)["attempts"] == QUESTIONS * ATTEMPTS
    assert grade.main(arguments) == 0
    enhance(ws.root)
    assert dpo_data.main(arguments) == pool.main(arguments) == 0
    graded = [manifest.read(ws, 1, "grade", shard).metrics for shard in range(SHARDS)]
    assert sum(one["samples"] for one in graded) == QUESTIONS * ATTEMPTS
    assert sum(one["right"] + one["wrong"] for one in graded) == QUESTIONS * ATTEMPTS
    zones = {zone: sum(one[f"zone_{zone}"] for one in graded) for zone in ("mastered", "learning", "too_hard")}
    assert sum(zones.values()) == QUESTIONS and all(zones.values())
    pairs = manifest.read(ws, 1, "dpo_data", 0).metrics
    assert pairs["questions_with_pairs"] == zones["learning"] + zones["too_hard"]
    assert pairs["pairs_new"] == pairs["pairs_train"] + pairs["pairs_validation"] > QUESTIONS
    following = manifest.read(ws, 1, "pool", 0).metrics
    assert (following["failed"], following["enhanced"]) == (zones["too_hard"], zones["mastered"] + zones["learning"])


@pytest.mark.parametrize("kind", KINDS)
def test_attempts_are_as_right_as_they_are_meant_to_be(kind: str) -> None:
    checker = Checker("math")
    for number in range(5):
        question = made(number, [kind])
        reference = checker.reference(question.forms[0])
        said = [checker.verdict(reference, attempt(question, n, right=n % 2 == 0)).right for n in range(4)]
        assert said == [True, False, True, False], question
