"""Graded attempts, read question by question: texts for Python, tokens left to Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from hpc_rl.data.dpo import Attempts, Pair, Solution, schema

COLUMNS = ("group", "text", "reward_correctness", "prompt_token_ids", "token_ids")
MOST_BYTES = 4 * 2**20
"""Attempts in memory at once, as long as they are of more than one row group."""


@dataclass(frozen=True)
class Answered:
    """A question's attempts that count.

    Attributes
    ----------
    place
        Of the question in the pool.
    attempts
        Texts.
    right, wrong
        Their rows in the piece.
    """

    place: int
    attempts: Attempts
    right: Sequence[int]
    wrong: Sequence[int]


@dataclass(frozen=True, eq=False)
class Piece:
    """Attempts at some questions, all that there are at these."""

    table: Any

    def answered(self) -> Iterator[Answered]:
        """Question by question; attempts that are left out are not there."""
        groups, texts, rewards = (self.table[name].to_pylist() for name in COLUMNS[:3])
        for place, rows in groupby(range(len(groups)), key=groups.__getitem__):
            graded = [row for row in rows if rewards[row] is not None]
            right = [row for row in graded if rewards[row] > 0]
            wrong = [row for row in graded if rewards[row] <= 0]
            attempts = Attempts(right=[texts[row] for row in right], wrong=[texts[row] for row in wrong])
            yield Answered(place, attempts, right, wrong)

    def pairs(self, chosen: Sequence[tuple[Answered, Pair]]) -> Any:
        """A table of pairs with their tokens (`dpo.schema`)."""
        import pyarrow as pa

        kind, rows = schema(), self.table.num_rows
        solutions = [pair.chosen for _, pair in chosen if isinstance(pair.chosen, Solution)]
        added = iter(range(rows, rows + len(solutions)))
        better = [next(added) if isinstance(p.chosen, Solution) else of.right[p.chosen] for of, p in chosen]
        worse = [of.wrong[pair.rejected] for of, pair in chosen]
        tokens = kind.field("prompt_token_ids").type
        prompts, sampled = (_whole(self.table[name], tokens) for name in ("prompt_token_ids", "token_ids"))
        answers = pa.concat_arrays([sampled, pa.array([one.token_ids for one in solutions], tokens)])
        texts = pa.concat_arrays(
            [_whole(self.table["text"], pa.string()), pa.array([s.text for s in solutions], pa.string())]
        )
        # one prompt per question, not one per pair: chats are the slowest to make of Python objects
        asked = {of.place: pair.prompt for of, pair in chosen}
        places = {place: number for number, place in enumerate(asked)}
        chats = pa.array(list(asked.values()), kind.field("prompt").type)
        made = {
            "prompt": chats.take(pa.array([places[of.place] for of, _ in chosen], pa.int64())),
            "chosen": texts.take(pa.array(better, pa.int64())),
            "rejected": texts.take(pa.array(worse, pa.int64())),
            "chosen_from": pa.array(["reference" if row >= rows else "attempt" for row in better], pa.string()),
            "prompt_token_ids": prompts.take(pa.array(worse, pa.int64())),
            "chosen_token_ids": answers.take(pa.array(better, pa.int64())),
            "rejected_token_ids": answers.take(pa.array(worse, pa.int64())),
        }
        columns = [
            made[one.name] if one.name in made else pa.array([getattr(pair, one.name) for _, pair in chosen], one.type)
            for one in kind
        ]
        return pa.Table.from_arrays(columns, schema=kind)


def pieces(graded: Iterable[Path]) -> Iterator[Piece]:
    """The attempts of a round in pieces that part no question; the files are in the order of their questions."""
    import numpy as np
    import pyarrow as pa

    rest: Any = None
    for table in _tables(graded):
        if rest is not None:
            table = pa.concat_tables([rest, table])
        groups = table["group"].to_numpy()
        start = int(np.searchsorted(groups, groups[-1]))
        if start:
            yield Piece(table.slice(0, start))
        rest = table.slice(start)
    if rest is not None:
        yield Piece(rest)


def _tables(graded: Iterable[Path]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for path in graded:
        with pq.ParquetFile(path) as file:
            waiting: list[int] = []
            size = 0
            for group in range(file.num_row_groups):
                waiting.append(group)
                size += file.metadata.row_group(group).total_byte_size
                if size > MOST_BYTES or group == file.num_row_groups - 1:
                    yield file.read_row_groups(waiting, columns=list(COLUMNS))
                    waiting, size = [], 0


def _whole(column: Any, kind: Any) -> Any:
    """One array of a table's column."""
    return column.cast(kind).combine_chunks()
