"""The load test in short: replicas are killed and started again while clients ask; every request is answered right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.service_load import Game, is_right

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_request_is_answered_right_while_replicas_are_killed_and_come_back() -> None:
    command = [sys.executable, "-m", "benchmarks.service_load", "--minutes=0.2", "--clients=8", "--kill-every=4"]
    done = subprocess.run([*command, "--rate=4"], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    counts = {name: int(count) for name, count in re.findall(r"(requests|wrong|lost|kills) (\d+),", last)}
    assert counts.pop("requests") > 50, last
    assert counts == {"wrong": 0, "lost": 0, "kills": 2} and last.endswith(": OK"), last


@pytest.mark.parametrize(
    ("results", "right"),
    [
        ([{"yes_probabilities": [0.1, 0.900001], "predicted_index": 1}], True),
        ([{"yes_probabilities": [0.1, 0.9001], "predicted_index": 1}], False),
        ([{"yes_probabilities": [0.1, 0.9], "predicted_index": 0}], False),
        ([{"yes_probabilities": [0.9, 0.1], "predicted_index": 0}], False),
        ([{"yes_probabilities": [0.1], "predicted_index": 0}], False),
        ([{"error": "no image"}], False),
        ([], False),
    ],
)
def test_the_load_test_would_notice_a_wrong_answer(results: list[object], right: bool) -> None:
    games: list[Game] = [{"candidate_paths": ["a", "b"], "question": "?"}]
    assert is_right(games, {"results": results}, {("a", "?"): 0.1, ("b", "?"): 0.9}) is right
