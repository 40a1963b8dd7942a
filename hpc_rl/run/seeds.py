"""Every random number of a run comes from its seed and from what it is for, never from when or where it is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def derive(run_seed: int, *parts: str | int) -> int:
    """A seed in [0, 2**31) for one purpose, e.g. `derive(seed, round, "speaker", row_id, attempt)`.

    Distinct `parts` give independent seeds (the first 31 bits of a SHA-256), equal ones the same seed on every machine.
    """
    text = "\x1f".join([str(run_seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def seeded_order(items: Sequence[T], seed: int, *parts: str | int, key: Callable[[T], str] = str) -> list[T]:
    """Items in an order that depends on the seed, on `parts` and on the items only, not on the order they come in.

    Sorting by a hash instead of shuffling makes the result the same for shards that arrive in any order, and adding an
    item moves no other. `key` must name items uniquely.
    """
    return sorted(items, key=lambda item: (derive(seed, *parts, key(item)), key(item)))
