"""The fixture `cluster`: one real Slurm cluster for the whole test session, empty and whole before every test."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.bringup import why_unavailable
from tests.slurm.cluster import SlurmCluster

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
