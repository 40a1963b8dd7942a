"""Pairs of answers to a prompt, one of them better.

A parquet file of pairs has the columns

    pair_id                                     string, unique in the round
    row_id                                      string, whose pictures the prompt shows; read where there are pictures
    prompt_token_ids, chosen_token_ids,
    rejected_token_ids                          lists of token ids, image tokens written out; or in their place
    prompt, chosen, rejected                    strings, or a chat and what the assistant answers (`encoding`); not read
                                                where token ids are there
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hpc_rl.engines.base import NO_VARIABLES
from hpc_rl.training.data import columns, encoding
from hpc_rl.training.data.columns import STRING, TOKENS
from hpc_rl.training.data.limits import Limits, TooLong
from hpc_rl.training.data.rows import Chunks, Writer, Written, once, open_index, room
from hpc_rl.training.data.units import Units, alone
from hpc_rl.training.errors import NothingToLearn

log = logging.getLogger(__name__)

ID, ROW = "pair_id", "row_id"
PROMPT, CHOSEN, REJECTED = "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"
SCHEMA = pa.schema([(ID, STRING), (PROMPT, TOKENS), (CHOSEN, TOKENS), (REJECTED, TOKENS)])
MEASURED = "measured"
"""Column of the index: of pairs that are not trained on."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A prompt and two answers.

    Attributes
    ----------
    id, row_id
        Its name, and whose pictures the prompt shows (empty: none).
    prompt_ids, chosen_ids, rejected_ids
        (P,), (C,) and (R,) int32.
    """

    id: str
    row_id: str
    prompt_ids: NDArray[np.int32]
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]


def read(
    files: Iterable[Path], tokenizer: Any, *, max_length: int | None = None, too_long: TooLong = "error",
    vocabulary: int | None = None, with_rows: bool = False, rank: int = 0, measured: Iterable[Path] = (),
    variables: Mapping[str, Any] = NO_VARIABLES,
) -> Units[Pair]:  # fmt: skip
    """The pairs of a round, in the order of the files. All ranks must call it; the first of each node reads.

    Parameters
    ----------
    files
        One per shard.
    tokenizer
        For texts that are no token ids yet.
    variables
        Of its chat template (`chat_template_kwargs`).
    max_length, too_long
        Most tokens of the prompt and the longer answer, and what becomes of a pair that has more.
    vocabulary
        Tokens of the model; None: not checked.
    with_rows
        Whether the prompts show pictures, so that the files name their rows.
    measured
        Further files, whose pairs are not trained on; see `split`.

    Raises
    ------
    UnusableData
        When a pair is damaged, is there twice, or has two answers that are the same; NothingToLearn when there is none.
    OSError
        When the disk is full.
    """
    encoder, limits = encoding.Encoder(tokenizer, variables), Limits(max_length, too_long, vocabulary)
    every = chain(((file, False) for file in files), ((file, True) for file in measured))
    units = once(rank, lambda folder: _write(every, folder, encoder, limits, with_rows), _open)
    log.info("pairs: %s", units.numbers())
    return units


def split(units: Units[Pair]) -> tuple[Units[Pair], Units[Pair]]:
    """The pairs that are trained on, and those that are only measured. Either may be none."""
    measured = units.index[MEASURED]
    trained, others = (
        replace(units, index=units.index[which], starts=alone(int(which.sum()))) for which in (~measured, measured)
    )
    return trained, replace(others, left_out={})


def _write(
    files: Iterable[tuple[Path, bool]], folder: Path, encoder: encoding.Encoder, limits: Limits, with_rows: bool
) -> Written:
    more = {ROW: STRING} if with_rows else {}
    schema = SCHEMA.append(pa.field(ROW, STRING)) if with_rows else SCHEMA
    too_long = {False: 0, True: 0}
    with room(folder, "pairs"), Writer(folder, ID, schema, [(MEASURED, np.bool_)]) as writer:
        for file, measured in files:
            if with_rows:  # a text does not say where the pictures are
                columns.choose(file, [PROMPT, CHOSEN, REJECTED])
            for rows, found in encoding.tokens(file, ID, ["chosen", "rejected"], encoder, more):
                limits.check(rows, found)
                rows.refuse_first(_same(found[CHOSEN], found[REJECTED]), "rejected", "it is the chosen answer")
                prompt, chosen, rejected = (
                    pc.list_value_length(found[n]).to_numpy() for n in (PROMPT, CHOSEN, REJECTED)
                )
                lengths = prompt + np.maximum(chosen, rejected)
                keep = limits.keep(rows, "prompt with its longer answer", lengths)
                names = {ID: rows[ID], **({ROW: rows[ROW]} if with_rows else {})}
                kept = pa.RecordBatch.from_pydict({**names, **found}).filter(pa.array(keep))
                index = writer.add(file, rows.ids, keep, kept)
                index["length"], index[MEASURED] = lengths[keep], measured
                too_long[measured] += int((~keep).sum())
        index = writer.index()
        if not len(index):
            raise NothingToLearn(f"no pair is left: {writer.read} were read, {sum(too_long.values())} are too long")
        left_out = {"too_long": too_long[False], **({"validation_too_long": too_long[True]} if too_long[True] else {})}
        return writer.save(index, left_out)


def _same(one: pa.Array, other: pa.Array) -> NDArray[np.bool_]:
    """(rows,) where two columns hold the same lists."""
    lists = [
        np.split(column.flatten().to_numpy(), np.cumsum(pc.list_value_length(column).to_numpy())[:-1])
        for column in (one, other)
    ]
    return np.array([np.array_equal(a, b) for a, b in zip(*lists, strict=True)])


def _open(written: Written) -> Units[Pair]:
    index, chunks = open_index(written.folder), Chunks(written.folder)

    def reader(places: NDArray[Any]) -> list[Pair]:
        rows = [chunks(place) for place in places]
        return [
            Pair(row[ID], row.get(ROW, ""), *(row.array(name) for name in (PROMPT, CHOSEN, REJECTED))) for row in rows
        ]

    return Units(index, alone(len(index)), reader, written.digest, left_out=written.left_out)
