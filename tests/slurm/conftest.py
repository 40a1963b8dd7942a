"""The fixture `cluster`: one real Slurm cluster for the whole test session, empty and whole before every test.

And a small run beside it that nobody disturbs, to begin others from and to compare them with.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.bringup import why_unavailable
from tests.slurm.cluster import SlurmCluster
from tests.slurm.runs import ClusterRun
from tests.slurm.small_lewis import CONFIG, SMALL, TWO_RANKS

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder that asks for the cluster carries the marker `slurm`."""
    for item in items:
        if HERE in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A running cluster. Where none can run the test is skipped with the reason; in CI that is an error."""
    reason = why_unavailable()
    if reason and os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI must run the Slurm tests, but {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
    # not below pytest's own temporary folder: that has too long a path for Unix sockets, and is closed to other users
    root = Path(tempfile.gettempdir(), f"hpc_rl-slurm-{secrets.token_hex(4)}")
    with SlurmCluster(root) as running:
        yield running


@pytest.fixture(autouse=True)
def _leave_the_cluster_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").reset()


@pytest.fixture(scope="session")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRun]:
    """The small run that nobody disturbs, to its end; trained on two nodes. Of all tests."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = ClusterRun(cluster, folder, CONFIG, [*SMALL, *TWO_RANKS])
    run.launch()
    assert not run.manifests(1, "sample"), "the launcher stayed until round 1 was under way"
    run.wait_until_finished()
    yield run
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_from(cluster: SlurmCluster, tmp_path: Path, undisturbed: ClusterRun) -> Iterator[Callable[..., ClusterRun]]:
    """A run in which some stages of the undisturbed one are done already."""

    def make(*stages: str, settings: tuple[str, ...] = (), folder: str = "run") -> ClusterRun:
        run = ClusterRun(cluster, tmp_path / folder, CONFIG, [*SMALL, *settings])
        for part in ("rounds/round_00", "datasets", "images", *(f"rounds/round_01/{stage}" for stage in stages)):
            claims = shutil.ignore_patterns("leases", "tasks", "attempts")
            shutil.copytree(undisturbed.ws.root / part, run.ws.root / part, ignore=claims, dirs_exist_ok=True)
        return run

    yield make
    shutil.rmtree(tmp_path, ignore_errors=True)
