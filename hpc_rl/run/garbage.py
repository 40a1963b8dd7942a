"""Python's garbage collector in a job with many small objects, most of them for long: rows, parsers, their caches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 50_000
"""More than there were, less those that are gone, before it looks again; Python's own number is 700 (gc)."""
YOUNGER = 20
"""Looks at the younger objects for each one at the older, twice as many as Python's own."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage less often meanwhile: it goes through all that is kept each time. Costs a few megabytes."""
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, YOUNGER, YOUNGER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
