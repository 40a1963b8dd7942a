"""Every random number of a run comes from its seed and from what it is for, never from when or where it is drawn."""

from __future__ import annotations

import hashlib


def derive(run_seed: int, *parts: str | int) -> int:
    """A seed in [0, 2**31) for one purpose, e.g. `derive(seed, round, "speaker", row_id, attempt)`.

    Distinct `parts` give independent seeds (the first 31 bits of a SHA-256), equal ones the same seed on every machine.
    """
    text = "\x1f".join([str(run_seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
