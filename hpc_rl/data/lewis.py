"""Rows of the Lewis game: what one holds, how they are stored, and which of them a round plays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from hpc_rl.run import atomic
from hpc_rl.run.seeds import seeded_order
from hpc_rl.run.workspace import Workspace

SETS = ("train", "new_views", "validation")
"""The data sets of a run: training games; training concepts in pictures never trained on; held-out concepts."""

T = TypeVar("T")


@dataclass(frozen=True)
class GameRow:
    """One game: the speaker describes `image`, the listener must find the target among `ret_paths`.

    Attributes
    ----------
    id : str
        Unique in the run's data sets.
    image : str
        The target picture, relative to the image root, like every path here.
    ret_paths : tuple of str
        The K candidates in the order that the listener sees: another view of the target's concept and K−1 of other
        concepts.
    names : tuple of str
        Names of the candidates: A, B, C, …
    speaker_problem : str
        The speaker's prompt.
    solution : str
        Name of the right candidate.
    label : int
        Its index in `ret_paths`.
    category, concept : str
        What the target is.
    """

    id: str
    image: str
    ret_paths: tuple[str, ...]
    names: tuple[str, ...]
    speaker_problem: str
    solution: str
    label: int
    category: str
    concept: str


def image_root(ws: Workspace, configured: str | Path | None) -> Path:
    """Where the paths of rows start: `data.image_root`, or the run's own pictures where the config names none."""
    return ws.images_dir if configured is None else Path(configured)


class Rows(Sequence[GameRow]):
    """Rows as columns: a row is made when it is asked for, and a part of them is a view.

    125 000 rows take 31 MB; as objects they would take half a gigabyte.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    @classmethod
    def of(cls, rows: Iterable[GameRow]) -> Rows:
        """These rows, in order."""
        import pyarrow as pa

        strings = pa.list_(pa.string())
        schema = pa.schema([
            ("id", pa.string()), ("image", pa.string()), ("ret_paths", strings), ("names", strings),
            ("speaker_problem", pa.string()), ("solution", pa.string()), ("label", pa.int32()),
            ("category", pa.string()), ("concept", pa.string()),
        ])  # fmt: skip
        return cls(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema))

    @property
    def ids(self) -> list[str]:
        """`GameRow.id` of each."""
        ids: list[str] = self._table["id"].to_pylist()
        return ids

    def take(self, places: Sequence[int]) -> Rows:
        """The rows at `places`, copied, in that order."""
        return Rows(self._table.take(places) if places else self._table.slice(0, 0))

    def write(self, path: Path) -> None:
        """Write them as parquet, in order, in one atomic step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(self._table, sink)
        atomic.write_bytes(path, sink.getvalue().to_pybytes())

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, place: int) -> GameRow: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> GameRow | Rows:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            assert step == 1, "rows are taken in order"
            return Rows(self._table.slice(start, max(0, stop - start)))
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return next(iter(self[place % len(self) :][:1]))

    def __iter__(self) -> Iterator[GameRow]:
        for batch in self._table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield GameRow(**{**row, "ret_paths": tuple(row["ret_paths"]), "names": tuple(row["names"])})


def write_rows(path: Path, rows: Iterable[GameRow]) -> None:
    """Write rows as parquet, in order, in one atomic step."""
    Rows.of(rows).write(path)


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote, in order."""
    import pyarrow.parquet as pq

    repeated = ["speaker_problem", "solution", "category", "concept"]
    return Rows(pq.read_table(path, read_dictionary=repeated))


def merge_rows(shards: Iterable[Sequence[GameRow]], seed: int) -> list[GameRow]:
    """All shards' rows in one seeded order, which does not depend on the order of the shards.

    Raises
    ------
    ValueError
        If two rows have the same id.
    """
    rows = [row for shard in shards for row in shard]
    if len({row.id for row in rows}) != len(rows):
        raise ValueError("two shards of the prepare stage hold rows with the same id")
    return seeded_order(rows, seed, "merge", key=lambda row: row.id)


def rows_of_round(rows: Rows, round: int, *, prompts_per_round: int, seed: int) -> Rows:
    """The training rows whose images the speaker describes in one round.

    The rounds walk through the data set epoch by epoch, each epoch in its own seeded order. The last
    `len(rows) % prompts_per_round` rows of an epoch's order sit that epoch out, so that no round meets a row twice.

    Parameters
    ----------
    rows : Rows
        The training set, in any order.
    round : int
        Round number, from 1.
    prompts_per_round : int
        sample.prompts_per_round.
    seed : int
        run.seed.

    Returns
    -------
    Rows
        `prompts_per_round` different rows.

    Raises
    ------
    ValueError
        If the training set is smaller than a round.
    """
    rounds_per_epoch = len(rows) // prompts_per_round
    if rounds_per_epoch == 0:
        raise ValueError(
            f"a round takes sample.prompts_per_round={prompts_per_round} rows, but the training set has {len(rows)}: "
            "raise data.train_rows or lower sample.prompts_per_round"
        )
    epoch, place = divmod(round - 1, rounds_per_epoch)
    ids = rows.ids
    order = seeded_order(range(len(rows)), seed, "epoch", epoch, key=ids.__getitem__)
    return rows.take(order[place * prompts_per_round : (place + 1) * prompts_per_round])


def shard_of(rows: Sequence[T], index: int, shard_size: int) -> Sequence[T]:
    """The rows of one shard: `rows[index * shard_size : (index + 1) * shard_size]`."""
    return rows[index * shard_size : (index + 1) * shard_size]
