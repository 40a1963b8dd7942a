"""Units of data: what a batch is counted in, known by a row of numbers each and read when their turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

U = TypeVar("U")

INDEX = [("id_hash", np.uint64), ("length", np.int32), ("chunk", np.int32), ("row", np.int32)]
"""What is known of every row without reading it: a hash of its id, its tokens in a forward pass, where it lies."""


@dataclass(frozen=True, eq=False)
class Units(Generic[U]):
    """All that a round trains on. A unit is what a batch is counted in: a rollout, a pair, a text, a question.

    Attributes
    ----------
    index
        (N,) what is known of each unit without reading it: at least `id_hash` and `length`, its tokens.
    starts
        (G + 1,) where each group of units that stay side by side starts, and N.
    reader
        Reads the units that some rows of the index stand for.
    digest
        Equal for equal data.
    left_out
        How many were read and are no unit, by the reason.
    """

    index: NDArray[Any]
    starts: NDArray[np.int64]
    reader: Callable[[NDArray[Any]], list[U]]
    digest: str
    left_out: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, places: NDArray[np.int64] | slice) -> list[U]:
        """Units by their numbers, in that order."""
        return self.reader(self.index[places])

    def part(self, number: int, parts: int) -> Self:
        """One of several parts of the same units, in their order: groups stay whole, and a part may have none."""
        groups = len(self.starts) - 1
        starts = self.starts[number * groups // parts : (number + 1) * groups // parts + 1]
        return replace(self, index=self.index[starts[0] : starts[-1]], starts=starts - starts[0])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(N,) tokens of each unit."""
        found: NDArray[np.int32] = self.index["length"]
        return found

    def numbers(self) -> dict[str, float]:
        """For the log and the manifest: how many there are, how many were left out and why, how long they are."""
        least, median, high, most = np.percentile(self.lengths, (0, 50, 95, 100))
        return {
            "units": len(self),
            **self.left_out,
            "tokens": int(self.lengths.sum(dtype=np.int64)),
            "length_min": int(least), "length_median": float(median),
            "length_p95": float(high), "length_max": int(most),
        }  # fmt: skip


def alone(count: int) -> NDArray[np.int64]:
    """`Units.starts` where no unit belongs to another."""
    return np.arange(count + 1, dtype=np.int64)


def id_hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    """(N,) a hash of each id."""
    return np.frombuffer(b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids), np.uint64)
