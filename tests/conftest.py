"""Settings of the whole test session: one thread per process, none that spins, nothing from a hub."""

from __future__ import annotations

import os

import pytest

# before anything imports torch; processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (`-n 2`) a file's tests stay together, and all that use the cluster are one file.

    Those go first: they take longest, and mostly wait.
    """
    on_cluster = {item for item in items if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item not in on_cluster)
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if item in on_cluster else str(item.path)))
