"""What sampling tasks at work ask of the file system's server: shards, looks, progress, records, heartbeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hpc_rl import config as configs
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.code import source_root
from tests.orchestrate import operations
from tests.waiting import PATIENCE_S

SHARDS, TASKS, PAUSE_S = 56, 4, 0.08
SHARD_S, PER_S = 3.0, 0.3
"""What a shard takes where nothing else runs; operations a second and task, whatever the shards, and a half more."""
IN_HAND = 4
"""Shards that a task may have in hand: while so many are left for each, some are free."""


def test_a_shard_that_is_sampled_costs_at_most_eight_metadata_operations(tmp_path: Path) -> None:
    if reason := operations.why_not():
        assert os.environ.get("CI", "") not in ("1", "true", "True"), reason
        pytest.skip(reason)
    file = tmp_path / "run.yaml"
    file.write_text("recipe: tests.orchestrate.shards_recipe\nrun: {name: costs, rounds: 1}\n")
    ws = open_run(configs.load(file, [], {}, tmp_path / "run", cwd=tmp_path), file).ws
    traces = [tmp_path / f"trace-{number}" for number in range(TASKS)]
    task = [sys.executable, "-m", "tests.sampling.letters_task", "--workspace", str(ws.root), "--round", "1"]
    settings = {"shards": SHARDS, "pause_s": PAUSE_S, "together": TASKS, "speculate": True}
    environment = {**os.environ, "LETTERS": json.dumps(settings)}
    tasks = [
        subprocess.Popen([*operations.traced(trace), *task, "--stage", "cut"], cwd=source_root(), env=environment)
        for trace in traces
    ]
    try:
        assert [task.wait(PATIENCE_S) for task in tasks] == [0] * TASKS
    finally:
        for one in tasks:
            one.kill()
    done = [manifest.read(ws, 1, "cut", shard) for shard in range(SHARDS)]
    first_of_each = {one.metrics["task"]: one.ended for one in sorted(done, key=lambda one: one.ended, reverse=True)}
    since = max(first_of_each.values())
    until = sorted(one.ended for one in done)[-IN_HAND * TASKS]
    shards = sum(since <= one.ended < until for one in done)
    assert len(first_of_each) == TASKS and shards > SHARDS // 3, "they were at work together"
    folder = ws.stage_dir(1, "cut")
    found = sum((operations.count(trace, folder, since, until) for trace in traces), Counter[str]())
    assert found["link"] >= 2 * shards - TASKS, "it counts"
    late_s = max(0.0, until - since - SHARD_S * shards / TASKS)  # on a slow machine: some operations go with time
    assert found.total() <= 8 * shards + PER_S * TASKS * late_s, f"{found.total() / shards:.1f} a shard: {found}"
    print(f"{found.total() / shards:.2f} operations a shard, of {shards} in {until - since:.0f} s: {found}")
