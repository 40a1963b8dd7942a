"""Staying with a run: what only takes long elsewhere does not end it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hpc_rl.cluster.choose import make_executor
from hpc_rl.orchestrate import follow as following
from hpc_rl.orchestrate.decide import Policy
from hpc_rl.orchestrate.reconcile import RECONCILE_LEASE, Report, RunBusy, reconcile
from hpc_rl.run import manifest
from hpc_rl.run.code import snapshot, source_root
from hpc_rl.run.lease import Lease, acquire
from tests.orchestrate.conftest import MakeRun
from tests.waiting import PATIENCE_S


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
    code = snapshot(run.ws, [source_root() / "benchmarks"])
    policy = Policy(run.config.run.lookahead, run.config.run.max_attempts, control=False)

    def follow() -> str:
        executor = make_executor(run.config, "local")
        return following.follow(run, executor, code, policy, said.append, poll_s=0.01).status

    if busy_at == 1:  # nothing runs yet, and whoever typed the command can do so again
        with pytest.raises(RunBusy):
            follow()
    else:
        assert follow() == "finished"
        assert "another process has been reconciling; trying again" in said


def test_jobs_that_run_here_are_started_while_another_process_reconciles(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, others = make_run("run.rounds=1"), list[Lease | None]()
    code = snapshot(run.ws, [source_root() / "benchmarks"])
    policy = Policy(run.config.run.lookahead, run.config.run.max_attempts, control=False)

    def then_another_one(*given: Any, **more: Any) -> Report:
        if others and len(manifest.done_shards(run.ws, 1, "evaluate")) == 1 and others[0] is not None:
            others[0].release()
        report = reconcile(*given, **more)
        if not others:
            others.append(acquire(run.ws.lease_folder, RECONCILE_LEASE, 3600.0))
        return report

    monkeypatch.setattr(following, "reconcile", then_another_one)
    said: list[str] = []
    deadline = time.monotonic() + PATIENCE_S

    def say(line: str) -> None:
        said.append(line)
        assert time.monotonic() < deadline, said

    decision = following.follow(run, make_executor(run.config, "local"), code, policy, say, poll_s=0.01)
    assert others[0] is not None and decision.status == "finished"
    assert sum("another process has been reconciling" in line for line in said) == 1, said
