"""What `jobs.serve` writes down besides its answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc_rl.orchestrate.job import load
from hpc_rl.run.workspace import Workspace
from jobs import serve

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
