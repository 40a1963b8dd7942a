"""Python's garbage collector in a job with many small objects, most of them for long: rows, parsers, their caches."""

from __future__ import annotations

import gc

NEW_OBJECTS = 50_000
"""More than there were, less those that are gone, before it looks again; Python's own number is 700 (gc)."""


def collect_seldom() -> None:
    """Look for garbage less often: in grading that is a twentieth of its time. Costs a few megabytes."""
    gc.set_threshold(NEW_OBJECTS, 20, 20)
