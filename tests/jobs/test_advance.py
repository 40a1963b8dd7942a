"""The body `advance`, where it cannot do its work."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.orchestrate.reconcile import RECONCILE_LEASE, reconcile
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run.code import source_root
from hpc_rl.run.lease import acquire
from hpc_rl.run.ledger import Ledger
from jobs import advance


def test_a_run_that_another_process_reconciles_blocks_it_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noop = source_root() / "benchmarks" / "noop.yaml"
    run = open_run(configs.load(noop, [], {}, tmp_path / "run", cwd=tmp_path), noop)
    lease = acquire(run.ws.lease_folder, RECONCILE_LEASE, 3600.0)
    assert lease is not None
    monkeypatch.setattr(advance, "reconcile", partial(reconcile, patience_s=0.1))
    with lease:
        assert advance.main(["--workspace", str(run.ws.root), "--round", "1"]) == EXIT_BLOCKED
    assert f"another process has been reconciling {run.ws.root}" in capsys.readouterr().out
    assert not Ledger(run.ws).history().attempts
