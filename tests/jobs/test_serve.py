"""How `jobs.serve` leaves, and what it writes down besides its answers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl import config as configs
from hpc_rl.orchestrate.job import Job, load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run.workspace import Workspace
from jobs import serve
from tests.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
NewRun = Callable[..., Workspace]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_service_shows_its_figures_in_tensorboard_where_the_run_wants_that(new_run: NewRun, wanted: bool) -> None:
    ws = new_run(f"logging.tensorboard={str(wanted).lower()}")
    with ThreadPoolExecutor(1) as thread:  # where it leaves this process's signals alone
        job = load(ws.root, 1, "evaluate")
        assert thread.submit(serve.serve, job, "listener", done=lambda: True).result() == 0
    folders = list((ws.tb_dir / "services" / "listener").glob("*"))
    assert len(folders) == wanted
    for folder in folders:
        shown = EventAccumulator(str(folder))
        shown.Reload()
        assert {"queue/items", "per_second/items", "model/busy"} <= set(shown.Tags()["scalars"])


ENDLESS = """
import sys, time, types
from jobs import serve

def open_service(*_):
    print("loading", flush=True)
    time.sleep(600)

sys.modules["endless"] = types.SimpleNamespace(open_service=open_service)
serve.SERVICES = {"listener": "endless"}
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [["--service", "listener"], ["--stage", "evaluate.listener"]])
def test_a_service_that_is_told_to_leave_while_it_loads_its_model_leaves_at_once(
    new_run: NewRun, how: list[str]
) -> None:
    ws = new_run()
    command = [sys.executable, "-c", ENDLESS, "--workspace", str(ws.root), "--round", "0", *how]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "loading\n" in process.stdout
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 143
        finally:
            process.kill()
    assert not list(ws.service_dir("listener").glob("*.json"))


REFUSED = """
import sys, types
from hpc_rl.services.frame import CannotServe
from jobs import serve

def open_service(*_):
    raise CannotServe("there is nothing to serve")

sys.modules["refused"] = types.SimpleNamespace(open_service=open_service)
serve.SERVICES = {"listener": "refused"}
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", [["--service", "listener"], ["--stage", "evaluate.listener"]])
def test_what_cannot_be_served_is_said_in_a_sentence(new_run: NewRun, how: list[str]) -> None:
    command = [sys.executable, "-c", REFUSED, "--workspace", str(new_run().root), "--round", "0", *how]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "there is nothing to serve\n")


@pytest.mark.parametrize("service", ["listener", "speaker"])
def test_a_run_of_another_recipe_has_nothing_of_the_game_to_serve(tmp_path: Path, service: str) -> None:
    noop = REPOSITORY / "benchmarks/noop.yaml"
    open_run(configs.load(noop, [], {}, tmp_path, cwd=REPOSITORY), noop)
    with ThreadPoolExecutor(1) as thread, pytest.raises(SystemExit, match=f"noop_recipe has no {service}"):
        thread.submit(serve.serve, load(tmp_path, 1, "evaluate"), service).result()


@pytest.mark.parametrize(
    ("placement", "environment", "stays"),
    [
        ("job", {}, False),
        ("hetjob", {}, True),
        ("hetjob", {"SLURM_JOB_ID": "7"}, False),
        ("job", {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2"}, True),
    ],
)
def test_a_service_that_nobody_asks_leaves_unless_that_would_free_nothing(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, placement: str, environment: dict[str, str], stays: bool
) -> None:
    ws = new_run(f"services.listener.placement={placement}", "services.listener.idle_timeout_s=0.1")
    monkeypatch.setattr(serve, "POLL_S", 0.2)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    looks = []

    def done() -> bool:
        looks.append(1)
        return len(looks) > 3

    with ThreadPoolExecutor(1) as thread:
        job = load(ws.root, 0, "evaluate.listener")
        assert thread.submit(serve.serve, job, "listener", done).result() == 0
    assert (len(looks) > 3) == stays


def test_a_service_that_nobody_asks_stays_while_its_consumer_is_at_work(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = new_run("services.listener.idle_timeout_s=0.1", "run.lease_ttl_s=60")
    monkeypatch.setattr(serve, "POLL_S", 0.2)
    ws.stage_dir(0, "evaluate").mkdir(parents=True)
    claims = load(ws.root, 0, "evaluate").claims()
    assert claims.next() is not None
    seen, really_at_work = [], serve.consumers_at_work

    def at_work(job: Job) -> bool:
        seen.append(really_at_work(job))
        if len(seen) == 3:
            claims.close()
        return seen[-1]

    monkeypatch.setattr(serve, "consumers_at_work", at_work)
    with ThreadPoolExecutor(1) as thread:
        arguments = ["--workspace", str(ws.root), "--round", "0", "--stage", "evaluate.listener"]
        assert thread.submit(serve.main, arguments).result() == 0
    assert seen == [True, True, True, False]
