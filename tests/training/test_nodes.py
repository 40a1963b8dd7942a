"""Work that one rank of each node does: once per node, seen by all of its ranks, and failed for all ranks alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.run.code import source_root
from tests.waiting import PATIENCE_S

RANK = """
import json, socket, sys
import torch.distributed as dist
from hpc_rl.training.ranks.nodes import once_per_node

rank, folder, fails = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "fails"
socket.gethostname = lambda: f"node{rank // 2}"  # ranks 0 and 1, ranks 2 and 3
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
worked = []

def work():
    worked.append(rank)
    if fails and rank == 2:
        raise ValueError("node1 has no room")
    return f"made by {rank}"

try:
    said = once_per_node(rank, work)
except ValueError as error:
    said = str(error)
print(json.dumps([worked, said]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("how", "heard"),
    [("works", ["made by 0", "made by 0", "made by 2", "made by 2"]), ("fails", ["node1 has no room"] * 4)],
)
def test_the_first_rank_of_each_node_works_for_its_node(tmp_path: Path, how: str, heard: list[str]) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), how], cwd=source_root(), stdout=subprocess.PIPE
        )
        for rank in range(4)
    ]
    said = [rank.communicate(timeout=2 * PATIENCE_S)[0] for rank in ranks]
    worked = [[0], [], [2], []]
    assert [json.loads(line.splitlines()[-1]) for line in said] == [
        list(pair) for pair in zip(worked, heard, strict=True)
    ]


def test_a_single_process_works_for_itself() -> None:
    from hpc_rl.training.ranks.nodes import once_per_node

    assert once_per_node(0, lambda: "made") == "made"
    with pytest.raises(OSError, match="no room"):
        once_per_node(0, lambda: (_ for _ in ()).throw(OSError("no room")))
