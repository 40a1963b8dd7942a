"""The gate: inputs that are late are waited for, inputs that will not come are not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.cluster.failures import Outcome
from hpc_rl.orchestrate import gate
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.run import atomic, manifest
from hpc_rl.run.manifest import Manifest
from hpc_rl.run.workspace import Workspace

SAMPLE = Stage(StageId(1, "sample"), "jobs.sample", Kind.ARRAY, shards=3)
GRADE = Stage(StageId(1, "grade"), "jobs.lewis.grade", Kind.SINGLE)


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def finish(ws: Workspace, stage: Stage, shards: int | None = None) -> None:
    for shard in range(stage.shards if shards is None else shards):
        manifest.write(ws, Manifest(stage.round, stage.name, shard, ()))


def record_end(ws: Workspace, stage: Stage, outcome: Outcome, ended: float) -> None:
    path = ws.attempts_dir(stage.round, stage.name) / f"run-r01-{stage.name}-a1-abc.end-{ended}.json"
    atomic.write_json(path, {"name": f"attempt-{ended:.0f}", "outcome": outcome.value, "ended": ended})


class Pauses:
    """Stands for `time.sleep`; something happens in the n-th pause."""

    def __init__(self, at: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.taken, self._at, self._then = 0, at, then

    def __call__(self, seconds: float) -> None:
        self.taken += 1
        if self.taken == self._at:
            self._then()
        time.sleep(0.01)


def absent(ws: Workspace, patience_s: float, pauses: Pauses) -> list[StageId]:
    return gate.wait_for_inputs(ws, [SAMPLE, GRADE], patience_s, pauses)


def test_a_stage_is_complete_with_its_last_shard(ws: Workspace) -> None:
    finish(ws, SAMPLE, 2)
    assert gate.missing(ws, [SAMPLE]) == [SAMPLE.id]
    finish(ws, SAMPLE)
    assert gate.missing(ws, [SAMPLE]) == []


def test_nothing_is_waited_for_when_all_is_there(ws: Workspace) -> None:
    finish(ws, SAMPLE)
    finish(ws, GRADE)
    pauses = Pauses()
    assert absent(ws, 3600, pauses) == [] and pauses.taken == 0


def test_inputs_that_come_late_open_the_gate(ws: Workspace) -> None:
    finish(ws, SAMPLE, 2)
    finish(ws, GRADE)
    pauses = Pauses(3, lambda: finish(ws, SAMPLE))
    assert absent(ws, 3600, pauses) == [] and pauses.taken == 3


def test_patience_has_an_end_and_what_is_missing_is_named(ws: Workspace) -> None:
    finish(ws, GRADE)
    pauses = Pauses()
    assert absent(ws, 0.2, pauses) == [SAMPLE.id] and pauses.taken > 0


def test_a_stage_that_is_known_to_have_failed_is_given_only_a_moment(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BRIEFLY_S", 0.2)
    finish(ws, GRADE)
    record_end(ws, SAMPLE, Outcome.DONE, 1.0)
    record_end(ws, SAMPLE, Outcome.ERROR, 2.0)
    pauses = Pauses()
    assert absent(ws, 3600, pauses) == [SAMPLE.id] and pauses.taken > 0, "and not an hour"


def test_a_stage_whose_last_job_ended_well_is_waited_for(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # its manifest is there, and this node is not shown it yet
    finish(ws, GRADE)
    record_end(ws, SAMPLE, Outcome.ERROR, 1.0)
    record_end(ws, SAMPLE, Outcome.DONE, 2.0)
    monkeypatch.setattr(gate, "BRIEFLY_S", 0.0)
    assert absent(ws, 3600, Pauses(3, lambda: finish(ws, SAMPLE))) == []
