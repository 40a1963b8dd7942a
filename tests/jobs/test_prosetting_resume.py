"""A run of ProSetting that is killed in each of its stages ends as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.teachers import sums
from tests.forked import Forked
from tests.jobs.dying import DONE, KILLS
from tests.teachers.server import Teacher
from tests.waiting import PATIENCE_S, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
DYING = REPOSITORY / "tests/jobs/dying.py"
QUESTIONS = 40
STAGES = ("collect", "grade", "dpo_data", "train", "enhance", "pool")
SMALL: Mapping[str, Any] = {
    "extends": [str(REPOSITORY / "configs/tiny/prosetting.yaml")],
    "run": {"rounds": 1, "linger_s": 1, "lease_ttl_s": 5},
    "cluster": {"file_system_lag_s": 0},
    "local": {"max_parallel_tasks": 2},
    "train_start_round": 1,
    "sample": {"engine": "transformers", "shards": 3, "samples_per_prompt": 4, "max_model_len": None},
    "dpo": {"epochs": 2, "per_device_batch_size": 8, "save_steps": 2},
}
"""Both rounds train, in some ten steps each."""


class Runs:
    """Runs of one config.

    Parameters
    ----------
    folder
        Where they lie, with their questions.
    more
        What the config has besides.
    """

    def __init__(self, folder: Path, **more: Any) -> None:
        self._folder, self._config = folder, folder / "run.yaml"
        every = json.loads((REPOSITORY / "configs/tiny/sums.json").read_text())
        (folder / "questions.json").write_text(json.dumps(every[:QUESTIONS]))
        asked = {"file": str(folder / "questions.json"), "held_out_file": None, "held_out_fraction": 0.2}
        self._config.write_text(yaml.safe_dump({**SMALL, "questions": asked, **more}))

    def in_one_process(self, orders: Sequence[str]) -> tuple[Workspace, Workspace]:
        """An undisturbed one, and one whose launcher, in which its bodies are too, is killed as `orders` say."""
        plans = [self._new("undisturbed"), self._new("killed", orders)]
        paths = [str(path) for ws, kills in plans for path in (ws.root, kills)]
        log = self._folder / "said"
        process = Forked("tests.jobs.dying", [str(self._config), *paths], log)
        try:
            code = process.wait(2 * PATIENCE_S)
        finally:
            process.kill()
        said = log.read_text()
        assert code == 0, said
        assert [line for line in said.splitlines() if line.startswith("launches: ")] == [
            "launches: 1", f"launches: {len(orders) + 1}"
        ]  # fmt: skip
        assert_obeyed(plans[1][1], orders)
        return plans[0][0], plans[1][0]

    def in_processes(self, name: str, orders: Sequence[str] = ()) -> Workspace:
        """One whose bodies are processes, which are killed with their launcher as `orders` say."""
        ws, kills = self._new(name, orders)
        dying = ("--set", f"cluster.container=[{sys.executable}, {DYING}]")
        launches, code, said = 0, -signal.SIGKILL, ""
        while code == -signal.SIGKILL:
            assert launches <= len(orders), said
            where = ("--workspace", str(ws.root), "--executor", "local")
            code, said = self._run("hpc_rl.launch", str(self._config), *where, *dying, kills=kills)
            launches += 1
            wait_for(lambda: not processes_of(ws), lambda: f"the end of {processes_of(ws)}")
        assert code == 0, said
        assert_obeyed(kills, orders)
        return ws

    def _new(self, name: str, orders: Sequence[str] = ()) -> tuple[Workspace, Path]:
        kills = self._folder / f"kills-{name}"
        kills.mkdir()
        for order in orders:
            (kills / order).touch()
        return Workspace(self._folder / name), kills

    def _run(self, *program: str, kills: Path) -> tuple[int, str]:
        """Exit code and output."""
        process = subprocess.Popen(
            [sys.executable, "-m", *program], cwd=REPOSITORY, text=True, env={**os.environ, KILLS: str(kills)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said = process.communicate(timeout=2 * PATIENCE_S)[0]
        finally:
            process.kill()
        return process.returncode, said


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    """The rule teacher at an address of its own, as somebody else's endpoint."""
    server = Teacher()
    server.behave = lambda call, body: sums.teacher(body["messages"], body.get("seed", 0))
    yield server
    server.die()


def test_a_run_that_is_killed_in_every_stage_ends_as_an_undisturbed_one(teacher: Teacher, tmp_path: Path) -> None:
    """Resumable at each of the five stages (S12), and at the pool."""
    client = {"client": {"url": teacher.url, "model": "sums", "deadline_s": PATIENCE_S / 2}}
    runs = Runs(tmp_path, services={"teacher": client, "enhancer": client})
    whole, killed = runs.in_one_process([f"1-{stage}" for stage in STAGES])
    assert_same(killed, whole)
    assert set(teacher.paid.values()) == {2}, "asked the same by both, and paid by each once"
    assert resumed_from(killed, 1) == 2


@pytest.mark.slow
def test_two_rounds_that_are_killed_in_every_stage_end_as_undisturbed_ones(tmp_path: Path) -> None:
    """With teachers that are jobs of the run. The second round's stages go on with what the first has left (S12)."""
    runs = Runs(tmp_path, run={**SMALL["run"], "rounds": 2})
    whole = runs.in_processes("undisturbed")
    killed = runs.in_processes("killed", [f"{round}-{stage}" for round in (1, 2) for stage in STAGES])
    assert_same(killed, whole)


def assert_same(killed: Workspace, whole: Workspace) -> None:
    """Every file of questions, of grades, of pairs, and every round's weights, are the same to the last bit."""
    graph = load(whole.root, 0, "pool").graph
    for stage in graph.work:
        if stage.name in ("collect", "train", "evaluate"):
            continue
        for shard in range(stage.shards):
            one, other = (manifest.read(ws, stage.round, stage.name, shard) for ws in (killed, whole))
            assert sums_of(one) == sums_of(other), stage.id
    for round in range(1, graph.rounds + 1):
        one, other = (manifest.read(ws, round, "train", 0) for ws in (killed, whole))
        assert one.made_from["weights_out"] == other.made_from["weights_out"] != other.made_from["weights"]
        one, other = (manifest.read(ws, round, "evaluate", 0) for ws in (killed, whole))
        assert one.metrics["accuracy"] == other.metrics["accuracy"]


def sums_of(made: manifest.Manifest) -> dict[str, str]:
    """Checksum of each output by what its name ends with; before that is the token of the claim."""
    return {".".join(Path(output.path).name.split(".")[-2:]): output.sha256 for output in made.outputs}


def assert_obeyed(kills: Path, orders: Sequence[str]) -> None:
    """All the deaths happened."""
    assert sorted(path.name for path in kills.iterdir()) == sorted(order + DONE for order in orders)


def resumed_from(ws: Workspace, round: int) -> int:
    """The step after which a training went on."""
    step: int = manifest.read(ws, round, "train", 0).metrics["resumed_from_step"]
    return step


def processes_of(ws: Workspace) -> list[str]:
    """Command lines of live processes that name a workspace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(ws.root) in command:
            found.append(command)
    return found
