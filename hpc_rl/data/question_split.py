"""Which questions of the file are trained on, which are for validation, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_rl.data.questions import Split
from hpc_rl.run.seeds import seeded_order


def split_roots(ids: Sequence[str], *, held_out: float, validation: float, seed: int) -> dict[str, Split]:
    """The split of each question of the file; all variants that are made of it in later rounds are in the same (S5).

    Drawn by a hash of the id, so it depends neither on the order of the ids nor on what else is drawn.

    Parameters
    ----------
    ids
        Different ones.
    held_out, validation
        Shares: of n questions `round(held_out · n)` are held out, of the m others `round(validation · m)` are for
        validation; at least one each, and at most what leaves one for each of the other sets. With `held_out` 0 none
        is held out.

    Raises
    ------
    ValueError
        When there are too few to have one of each.
    """
    least = 3 if held_out else 2
    if len(ids) < least:
        raise ValueError(f"{len(ids)} questions are too few to have one in each of {least} sets")
    number = min(max(1, round(held_out * len(ids))), len(ids) - 2) if held_out else 0
    drawn = seeded_order(ids, seed, "held_out")
    rest = seeded_order(drawn[number:], seed, "validation")
    measured = min(max(1, round(validation * len(rest))), len(rest) - 1)
    return {
        **dict.fromkeys(drawn[:number], "held_out"),
        **dict.fromkeys(rest[:measured], "validation"),
        **dict.fromkeys(rest[measured:], "train"),
    }
