"""How different the questions of a pool are from each other (S18): two standard numbers of a sample of them."""

from __future__ import annotations

import heapq
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from hpc_rl.run.seeds import derive

SAMPLE = 1000
"""Questions that are measured, drawn by the seed. Both numbers fall and rise with how much text is looked at, so rounds
can be compared because they are all measured on as many."""

_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Diversity:
    """What was measured.

    Attributes
    ----------
    distinct_2
        Different pairs of neighbouring words and signs / all of them, 0 … 1: the higher the more diverse. Li et al.
        2016, arXiv 1510.03055, section 5 (there over words; here over pairs, so that it reaches 1).
    compression_ratio
        Bytes of the text / bytes when deflated: the lower the more diverse. Shaib et al. 2024, arXiv 2403.00553.
    questions
        How many were measured.
    """

    distinct_2: float
    compression_ratio: float
    questions: int


def diversity(questions: Iterable[tuple[str, str]], seed: int) -> Diversity:
    """Of questions (id, text) in any order; those drawn are in memory. Of none, or of single words, it is 0."""
    drawn = heapq.nsmallest(SAMPLE, ((derive(seed, "diversity", id), id, text) for id, text in questions))
    pairs: set[tuple[str, str]] = set()
    number = 0
    for _, _, text in drawn:
        tokens = _TOKEN.findall(text.casefold())
        pairs.update(pairwise(tokens))
        number += max(0, len(tokens) - 1)
    whole = "\n".join(text for _, _, text in drawn).encode()
    return Diversity(
        distinct_2=round(len(pairs) / number, 4) if number else 0.0,
        compression_ratio=round(len(whole) / len(zlib.compress(whole)), 3) if whole else 0.0,
        questions=len(drawn),
    )
