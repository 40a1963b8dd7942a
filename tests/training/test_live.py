"""`rollouts: live`: two ranks sample by themselves and share one listener, one asker and one cache."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from hpc_rl.cluster.failures import EXIT_BLOCKED
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.services import handoff
from jobs import train
from tests.forked import Forked
from tests.training.conftest import NewRun, Ranks, start_ranks
from tests.waiting import PATIENCE_S, wait_for

LIVE = (
    "train.rollouts=live", "train.live_max_steps=3", "services.listener.client.deadline_s=180",
    "services.listener.client.backoff_factor=0.05",
)  # fmt: skip


@contextmanager
def listener(ws: Workspace) -> Iterator[str]:
    """`jobs.serve` for the train stage; its URL."""
    arguments = ("--workspace", str(ws.root), "--round", "1", "--stage", "train.listener")
    process = Forked("jobs.serve", arguments, ws.root / "serve.out", {"HPC_RL_JOB_ID": "9"})
    try:
        folder = ws.service_dir("listener")
        (found,) = wait_for(lambda: handoff.discover(folder), (ws.root / "serve.out").read_text, of=process)
        yield found.url
    finally:
        process.kill()
        process.wait()


def watch(url: str, token: str, ranks: Ranks) -> int:
    """How many pairs the listener had scored when the ranks were done (it leaves by itself soon after)."""
    scored, running = 0, True
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=PATIENCE_S) as client:
        while running:
            running = any(process.poll() is None for process in ranks.processes)  # and once more when all are done
            with suppress(httpx.TransportError):
                scored = client.get(f"{url}/health").json()["counters"]["items"]
            time.sleep(0.1)
    return scored


def test_two_ranks_share_one_asker(new_run: NewRun) -> None:
    ws = new_run(*LIVE, "stages.train.nodes=2", "train.per_device_batch_size=4", graded=False)
    with listener(ws) as url:
        ranks = start_ranks(ws, 2)
        scored = watch(url, handoff.read_token(ws.service_dir("listener")), ranks)
        assert ranks.wait() == [0, 0], ranks.said()
    made = manifest.read(ws, 1, "train", 0)
    assert made.metrics["steps"] == 3 and made.metrics["samples"] == 24 and made.metrics["left_out"] == 0
    lines = [json.loads(line) for line in made.path("predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and {line["step"] for line in lines} == {0, 1, 2}
    asked = {(json.dumps(line["description"]), tuple(line["candidates"])) for line in lines if line["description"]}
    assert scored == 3 * len(asked), "each question with its candidates went out once, for all ranks"
    groups: dict[tuple[int, str], set[float]] = {}
    for line in lines:
        groups.setdefault((line["step"], line["id"]), set()).add(line["reward"])
    equal = sum(len(rewards) == 1 for rewards in groups.values())
    assert len(groups) == 6 and equal < 6, "there is something to learn"
    assert made.metrics["mean_share_of_equal_groups"] == pytest.approx(equal / 6)
    assert made.metrics["mean_grad_norm"] > 0, "and it is learned from: with equal rewards all gradients are 0"


def test_without_a_listener_all_ranks_are_blocked_and_nothing_is_scored(new_run: NewRun) -> None:
    settings = ("stages.train.nodes=2", "train.per_device_batch_size=4", "services.listener.client.deadline_s=6")
    ws = new_run(*LIVE, *settings, graded=False)
    ranks = start_ranks(ws, 2)
    assert ranks.wait() == [EXIT_BLOCKED, EXIT_BLOCKED], ranks.said()
    for log in ranks.logs:
        assert "ServiceUnavailable: no answer to /batch_score within 6 s; last problem: no server is published" in (
            log.read_text()
        ), "each rank has the exception itself, and not the loss of another rank"
    assert not manifest.manifest_path(ws, 1, "train", 0).exists()
    assert not any(path.read_text() for path in ws.stage_dir(1, "train").glob("*predictions.jsonl"))


def test_what_goes_wrong_on_rank_0_is_known_to_all_ranks_at_once_and_keeps_its_meaning(tmp_path: Path) -> None:
    ranks = start_ranks(Workspace(tmp_path), 2, "1", ("tests.training.ranks", "reward_live"))
    assert ranks.wait() == [0, 0], ranks.said()
    first, second = ([line for line in log.read_text().splitlines() if "RAISED" in line] for log in ranks.logs)
    assert len(first) == len(second) == 2, ranks.said()
    assert first[0] == second[0] and first[0].startswith("RAISED ServiceRefused"), ranks.said()
    assert first[1].startswith("RAISED OSError") and "No space left" in first[1], ranks.said()
    assert second[1].startswith("RAISED RuntimeError rank 0 failed: OSError: [Errno 28] No space left"), ranks.said()


def test_more_completions_per_step_than_the_round_has_is_explained(new_run: NewRun) -> None:
    ws = new_run(*LIVE, "train.gradient_accumulation_steps=100", graded=False)
    with pytest.raises(ValueError, match=r"takes 800 completions, but the round has 12 prompts × 4: lower"):
        train.main(["--workspace", str(ws.root), "--round", "1"])
