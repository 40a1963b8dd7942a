"""What is said of stages by how their jobs ended."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.entry import EndRecord
from hpc_rl.orchestrate.decide import View
from hpc_rl.orchestrate.graph import StageId
from hpc_rl.orchestrate.overview import build
from hpc_rl.run.ledger import Attempt, History
from tests.orchestrate.simulation import lewis_like


@pytest.mark.parametrize("ended", ["grade", "grade.listener", None])
def test_a_service_that_ended_without_a_word_is_lost_unless_its_job_ended_with_its_leader(ended: str | None) -> None:
    stages = ("grade", "grade.listener")
    history = History(tuple(Attempt(stage, 1, stage, 1, "slurm", (), ("5",)) for stage in stages))
    end = EndRecord("", "5", 0, 0, "node1", "left", 143, "told to leave", "logs/x.out", 1.0, 2.0, 0.0, 0.0)
    done = {StageId(0, "train"): 2, StageId(1, "sample"): 2}
    view = View(lewis_like(1, 2, hetjob=True), done, history, (), {ended: [end]} if ended else {})
    shown = {overview.stage: overview for overview in build(view).stages if overview.stage in stages}
    lost = {stage for stage in stages if shown[stage].last_error.startswith("lost: job 5")}
    assert lost == {"grade": set(), "grade.listener": {"grade"}, None: set(stages)}[ended]
    assert {stage for stage in stages if shown[stage].state == "failed"} == lost
