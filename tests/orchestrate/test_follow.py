"""Staying with a run: what only takes long elsewhere does not end it."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rl.cluster.choose import make_executor
from hpc_rl.orchestrate import follow as following
from hpc_rl.orchestrate.decide import Policy
from hpc_rl.orchestrate.reconcile import Report, RunBusy, reconcile
from hpc_rl.run.code import source_root
from tests.orchestrate.conftest import MakeRun


@pytest.mark.parametrize("busy_at", [1, 2])
def test_a_run_that_another_process_reconciles_is_waited_for_once_it_is_under_way(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, busy_at: int
) -> None:
    calls: list[int] = []

    def busy_once(*given: Any, **more: Any) -> Report:
        calls.append(1)
        if len(calls) == busy_at:
            raise RunBusy("another process has been reconciling")
        return reconcile(*given, **more)

    monkeypatch.setattr(following, "reconcile", busy_once)
    run, said = make_run("run.rounds=1"), list[str]()
    policy = Policy(run.config.run.lookahead, run.config.run.max_attempts, control=False)

    def follow() -> str:
        executor = make_executor(run.config, "local")
        return following.follow(run, executor, source_root(), policy, said.append, poll_s=0.01).status

    if busy_at == 1:  # nothing runs yet, and whoever typed the command can do so again
        with pytest.raises(RunBusy):
            follow()
    else:
        assert follow() == "finished"
        assert "another process has been reconciling; trying again" in said
