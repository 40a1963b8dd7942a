"""Settings of the whole test session: one thread per process, none that spins, nothing from a hub, one cache."""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# how long an example takes says nothing on a busy machine; what else the profile in use says (`ci`) is kept
settings.register_profile("timeless", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")

os.umask(os.umask(0o022) | 0o022)  # as the launcher does: jobs run nothing that others may write to

# before anything imports torch; processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# vLLM imports itself once more in a process of its own, 8 s, to learn what a model class can do, and notes that here by
# the hash of its source (vllm/model_executor/models/registry.py). What is compiled stays apart: that is not shared.
if "VLLM_CACHE_ROOT" not in os.environ:
    os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="hpc_rl-tests-vllm-")  # xdist's workers inherit it
    atexit.register(shutil.rmtree, os.environ["VLLM_CACHE_ROOT"], ignore_errors=True)

LONG = ("engines", "training", "jobs")
TESTS = Path(__file__).parent
LONGEST_S = 600.0
"""Of a script that uses vLLM."""


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (`-n 3`) a file's tests stay together; tests of the cluster are two groups with one each.

    Those go first: they take longest, and mostly wait. Then the folders with long files, so that none is the last one.
    One group is of those that begin with the undisturbed run, so that it is played once; one of the scripts that use
    vLLM, so that it is imported once.
    """

    def place(item: pytest.Item) -> tuple[int, str]:
        fixtures = getattr(item, "fixturenames", ())
        if "undisturbed" in fixtures:
            return 0, "undisturbed"
        if "cluster" in fixtures:
            return 1, "cluster"
        if "run_with_vllm" in fixtures:
            return 2, "vllm"
        return 3 - (item.path.parent.name in LONG), str(item.path)

    items.sort(key=lambda item: place(item)[0])
    for item in items:
        item.add_marker(pytest.mark.xdist_group(place(item)[1]))


@pytest.fixture(scope="session")
def run_with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Runs a script with its arguments to its end, in a process that has imported vLLM (`vllm_forks.py`)."""
    folder = tmp_path_factory.mktemp("vllm_forks")
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "vllm_forks.py")]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        ) as forks,
    ):  # fmt: skip
        assert forks.stdin is not None and forks.stdout is not None
        asks, answers = forks.stdin, forks.stdout

        def run(script: Path, *arguments: object) -> None:
            own = folder / f"{script.stem}.log"
            code = ""
            with suppress(BrokenPipeError):  # its import failed
                asks.write(json.dumps([str(script), [*map(str, arguments)], str(own)]) + "\n")
                asks.flush()
                if select.select([answers], [], [], LONGEST_S)[0]:
                    code = answers.readline().strip()
                else:
                    os.killpg(forks.pid, signal.SIGKILL)
            assert code == "0", (own if own.exists() else folder / "log").read_text()[-3000:]

        yield run
