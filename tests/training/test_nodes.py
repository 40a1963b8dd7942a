"""Work that one rank of each node does: once per node, seen by all of its ranks, and failed for all ranks alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rl.run.workspace import Workspace
from tests.training.conftest import start_ranks


@pytest.mark.parametrize(
    ("how", "heard"),
    [("works", ["made by 0", "made by 0", "made by 2", "made by 2"]), ("fails", ["node1 has no room"] * 4)],
)
def test_the_first_rank_of_each_node_works_for_its_node(tmp_path: Path, how: str, heard: list[str]) -> None:
    ranks = start_ranks(Workspace(tmp_path), 4, program=("tests.training.ranks", f"once_per_node_{how}"))
    assert ranks.wait() == [0] * 4, ranks.said()
    said = [json.loads(log.read_text().splitlines()[-1]) for log in ranks.logs]
    assert said == [[worked, text] for worked, text in zip([[0], [], [2], []], heard, strict=True)]


def test_a_single_process_works_for_itself() -> None:
    from hpc_rl.training.ranks.nodes import once_per_node

    assert once_per_node(0, lambda: "made") == "made"
    with pytest.raises(OSError, match="no room"):
        once_per_node(0, lambda: (_ for _ in ()).throw(OSError("no room")))
