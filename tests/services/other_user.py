"""Work done by another user, in a folder that he may enter; pytest's own folders are closed to others."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def open_folder(mode: int = 0o755) -> Iterator[Path]:
    """A folder of ours with this mode."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def as_nobody(work: Callable[[], None]) -> None:
    """Run `work` in a process of another user, who must get through it; needs root."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")

    def run() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
