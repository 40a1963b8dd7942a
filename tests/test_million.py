"""Readers of a round take no more memory for more samples, but for a few bytes each (`benchmarks.million`, smaller)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.million import MOST_INODES, MOST_MB, footprint, make, run
from hpc_rl.orchestrate.job import load

SIDES = ("sample", "grade", "train", "report", "status")
SMALL, LARGE = (10_000, 100), (40_000, 400)
"""Samples and shards. Fewer than the small ones do not fill the buffers that every round fills."""

MILLION = 1_000_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What each side took, by the number of samples; a process has both rounds, the small one first."""
    found: dict[int, dict[str, Any]] = {}
    for samples, shards in (SMALL, LARGE):
        found[samples] = {"root": tmp_path_factory.mktemp("million") / "run"}
        make(found[samples]["root"], samples, shards, tokens=40)
    for side in SIDES:
        took = run(side, *(each["root"] for each in found.values()))
        for each, of_side in zip(found.values(), took, strict=True):
            each[side] = of_side
    return found


def test_every_sample_is_drawn_and_reaches_training(measured: dict[int, dict[str, Any]]) -> None:
    for samples, _ in (SMALL, LARGE):
        assert measured[samples]["sample"]["samples"] == measured[samples]["train"]["samples"] == samples
        assert f"{samples:,} samples of {samples // 4:,} prompts" in measured[samples]["report"]["said"]


@pytest.mark.parametrize("side", SIDES)
def test_a_million_samples_would_fit(measured: dict[int, dict[str, Any]], side: str) -> None:
    """Libraries and a small round take their part of the 1.5 GB first; the rest is for what grows with the samples."""
    small, large = (measured[samples][side]["peak_mb"] for samples, _ in (SMALL, LARGE))
    of_one = (large - small) / (LARGE[0] - SMALL[0])
    assert large + of_one * (MILLION - LARGE[0]) < MOST_MB


def test_a_shard_takes_three_inodes_at_most(measured: dict[int, dict[str, Any]]) -> None:
    root: Path = measured[LARGE[0]]["root"]
    inodes, _ = footprint(load(root, 1, "sample").folder)
    assert inodes / LARGE[1] <= MOST_INODES
