"""What a recipe shows of its rounds: tables of columns, each a metric of a stage's manifests.

    REPORT = (Table("the solver", (Column("pass@1", "evaluate", "accuracy"), ...)),)

in the recipe's module. A recipe without `REPORT` has everything else of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

Number = int | float
Fold = Literal["sum", "mean", "max"]


@dataclass(frozen=True)
class Column:
    """A number of each round.

    Attributes
    ----------
    title, note
        What stands above it; what is said of it below the table.
    stage, metric
        Whose manifests have it, and under which name. A round in which no shard has it shows nothing.
    fold
        How the shards' numbers become the round's: their sum, their mean, the largest.
    weight
        With `mean`: metrics of the same manifest whose sum is what a shard counts for. Empty: all count alike.
    trend
        The report says how it went from the first round that has it to the last one.
    """

    title: str
    stage: str
    metric: str
    note: str = ""
    fold: Fold = "sum"
    weight: tuple[str, ...] = ()
    trend: bool = False


@dataclass(frozen=True)
class Table:
    """Columns that belong together, a row per round.

    Attributes
    ----------
    about
        A sentence with `{metric}`s in it, which are filled in from the last round whose `about_stage` has them all.
    """

    title: str
    columns: tuple[Column, ...]
    about: str = ""
    about_stage: str = ""


@dataclass
class Folding:
    """One column's number in one round, while shards are looked at one after the other."""

    column: Column
    value: Number | None = None
    weight: Number = 0
    _sum: float = field(default=0.0, repr=False)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take in a shard."""
        column, found = self.column, metrics.get(self.column.metric)
        if not is_number(found):
            return
        if column.fold == "mean":
            weights = [number for name in column.weight if is_number(number := metrics.get(name))]
            weight = sum(weights) if column.weight else 1
            self.weight += weight
            self._sum += weight * found
            self.value = self._sum / self.weight if self.weight else None
        else:
            combine: Callable[[Iterable[Number]], Number] = sum if column.fold == "sum" else max
            self.value = found if self.value is None else combine((self.value, found))


def is_number(value: Any) -> TypeGuard[Number]:
    """True for numbers, which truth values are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
