"""Paths of a run: no disk is touched, and what is written into JSON survives a move of the folder."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.run.workspace import Workspace


def test_constructing_a_workspace_touches_no_disk(tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "run")
    assert ws.stage_dir(1, "sample") == tmp_path / "run/rounds/round_01/sample"
    assert ws.checkpoint_dir("speaker", 12) == tmp_path / "run/checkpoints/speaker/round_12"
    assert not ws.root.exists()


def test_paths_inside_are_written_relative_and_found_again_after_a_move(tmp_path: Path) -> None:
    before, after = Workspace(tmp_path / "a"), Workspace(tmp_path / "b")
    text = before.relative(before.stage_dir(1, "sample") / "x.parquet")
    assert text == "rounds/round_01/sample/x.parquet"
    assert after.resolve(text) == after.stage_dir(1, "sample") / "x.parquet"


def test_paths_outside_stay_what_they_are(tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "a")
    outside = tmp_path / "photos" / "cat.png"
    assert ws.resolve(ws.relative(outside)) == outside
