"""Before training all ranks meet and talk; who does not come, hangs, or runs other software is named by its node."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.cluster.rendezvous import hosts, tasks_by_host
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.ranks import meeting, preflight, versions
from hpc_rl.training.ranks.distributed import World
from hpc_rl.training.ranks.meeting import MeetingFailed, VersionsDiffer
from tests.training.conftest import start_ranks
from tests.waiting import PATIENCE_S, wait_for

PROGRAM = ("tests.training.ranks", "meet_two_nodes")
Meet = Callable[..., list[BaseException | None]]


@pytest.fixture
def meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Meet:
    """Ranks 2 n and 2 n + 1 are on node n + 1: threads, for who meets needs no process of its own."""
    node = lambda: f"node{int(threading.current_thread().name) // 2 + 1}"  # noqa: E731
    monkeypatch.setattr(meeting, "node_name", node)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")

    def bring(*ranks: int, within_s: float) -> list[BaseException | None]:
        def one(rank: int) -> None:
            threading.current_thread().name = str(rank)
            meeting.meet(World(rank, 4, rank % 2, 2), tmp_path / "rendezvous.json", "lo", within_s)

        with ThreadPoolExecutor(4) as pool:
            return [done.exception() for done in [pool.submit(one, rank) for rank in ranks]]

    return bring


def test_all_ranks_say_which_node_sent_too_few(meet: Meet) -> None:
    said = meet(0, 1, 2, within_s=1.0)
    assert [type(error) for error in said] == [MeetingFailed] * 3
    assert len(set(map(str, said))) == 1 and "1 rank of node2 (rank 3 of 4) did not come" in str(said[0])


def test_who_does_not_find_rank_0_says_where_it_should_be(meet: Meet) -> None:
    (said,) = meet(2, within_s=0.3)
    assert "rank 2 on node2 did not find rank 0 (on node1, the first node): " in str(said)
    assert "did not appear" in str(said)


def test_all_ranks_say_which_node_has_other_software(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = versions.here()
    monkeypatch.setattr(
        versions, "here", lambda: ours | ({"torch": "2.0.1"} if threading.current_thread().name == "2" else {})
    )
    said = meet(0, 1, 2, 3, within_s=PATIENCE_S)
    assert [type(error) for error in said] == [VersionsDiffer] * 4
    assert f"torch is '2.0.1' on node2 and {ours['torch']!r} on the others" in str(said[3])


def test_versions_are_those_that_would_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions.here()
    (tmp_path / "deepspeed-0.1.dist-info").mkdir()
    (tmp_path / "deepspeed-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    differ = versions.differences(["node1", "node2", "node3"], [before, versions.here(), before])
    assert differ == {"deepspeed": f"deepspeed is '0.1' on node2 and {before['deepspeed']!r} on the others"}


def test_four_ranks_of_two_nodes_measure_what_they_have(tmp_path: Path) -> None:
    ranks = start_ranks(Workspace(tmp_path), 4, "1", PROGRAM)
    assert ranks.wait() == [0] * 4, ranks.said()
    for rank, log in enumerate(ranks.logs):
        said = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
        assert said["bytes_per_s"].keys() == {f"inside node{rank // 2 + 1}", preflight.ALL}
        assert min(said["bytes_per_s"].values()) > 0


def test_a_node_whose_rank_is_frozen_is_named_by_all_others(tmp_path: Path) -> None:
    (tmp_path / "stops").touch()
    ranks = start_ranks(Workspace(tmp_path), 4, "1", PROGRAM)
    try:
        for process, log in zip(ranks.processes[:3], ranks.logs, strict=False):
            wait_for(lambda p=process: p.poll() is not None, ranks.said)
            assert process.returncode == EXIT_BLOCKED, ranks.said()
            assert "node2 (rank 3) hang: they do not answer" in log.read_text()
    finally:
        os.kill(ranks.processes[3].pid, signal.SIGCONT)
        ranks.kill()


def test_a_node_that_fails_with_both_neighbours_is_at_fault_and_a_lone_pair_is_a_link() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "d", "d"]
    names = [[talk.name for talk in turn] for turn in preflight.talks(nodes)]
    assert names[0] == ["inside a", "inside b", "inside c", "inside d"]
    assert names[1:] == [["between a and b", "between c and d"], ["between b and c"]]
    assert preflight.fault(nodes, [{}] * 8) == ""
    said = [{name: "timed out" for name in names[1] + names[2] if node in name.split()} for node in nodes]
    both = [{name: why for name, why in one.items() if "b" in name.split()} for one in said]
    assert preflight.fault(nodes, both) == "b cannot talk with either of its neighbours: timed out"
    last = [{name: why for name, why in one.items() if "d" in name.split()} for one in said]
    assert preflight.fault(nodes, last) == (
        "d cannot talk with c, which talks well with its other neighbour: timed out"
    )
    link = [{"between b and c": "timed out"} if node in "bc" else {} for node in nodes]
    assert preflight.fault(nodes, link).startswith("b and c cannot talk with each other")
    pair = [{"between a and b": "timed out"} if node in "ab" else {} for node in nodes]
    assert preflight.fault(nodes, pair).startswith("a cannot talk with b, which")
    assert preflight.fault(nodes, [{}] * 7 + [None]) == "d (rank 7) hang in the preflight"
    inside = [{"inside c": "no shared memory"} if node == "c" else {} for node in nodes]
    assert preflight.fault(nodes, inside) == "ranks inside c cannot talk: no shared memory"


def test_ranks_on_one_node_need_no_talks_of_pairs() -> None:
    assert preflight.talks(["a", "a"]) == []
    assert preflight.talks(["a", "b"]) == []


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("gpu[03-05,9],cpu1", ["gpu03", "gpu04", "gpu05", "gpu9", "cpu1"]),
        ("rack[1-2]node[3-4]", ["rack1node3", "rack1node4", "rack2node3", "rack2node4"]),
        ("login", ["login"]),
        ("", []),
    ],
)
def test_lists_of_nodes_are_spelt_out(listed: str, expected: list[str]) -> None:
    assert list(hosts(listed)) == expected


def test_the_tasks_of_each_node_are_known_in_a_step() -> None:
    step = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_TASKS_PER_NODE": "4(x3),1"}
    assert tasks_by_host(step) == {"n1": 4, "n2": 4, "n3": 4, "n4": 1}
    assert tasks_by_host({}) == {}
