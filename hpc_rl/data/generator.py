"""What a question generator learns from (S17): variants that a teacher wrote, the better the nearer to half solved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hpc_rl.data.questions import Question
from hpc_rl.teachers import enhancing

BEST, WIDTH = 0.5, 0.2
"""The success rate that a question should have, and how far off it is still of use."""


@dataclass(frozen=True)
class Text:
    """One row of generator.parquet.

    Attributes
    ----------
    text_id
        Unique in the run.
    prompt
        The chat that asks for a variant of the question's parent.
    completion
        The question, as its teacher gave it.
    weight
        `usefulness` of it.
    """

    text_id: str
    prompt: tuple[Mapping[str, str], ...]
    completion: str
    weight: float


def usefulness(success_rate: float) -> float:
    """U(s) = exp(−(s − 0.5)² / (2 · 0.2²)): 1 for what is solved half of the time (S17, arXiv:2509.24726)."""
    return math.exp(-((success_rate - BEST) ** 2) / (2 * WIDTH**2))


def text_of(round: int, question: Question, parent: Parent, success_rate: float) -> Text:
    """What the generator learns from a variant and its parent; the parent's attempts are not shown."""
    kind = cast(enhancing.Kind, question.kind)
    variant = enhancing.Variant(question.question, question.solution or "", question.answer)
    return Text(
        f"r{round:02d}-{question.question_id}",
        enhancing.messages(kind, parent.question, parent.answer, parent.solution),
        enhancing.completion(variant),
        usefulness(success_rate),
    )


@dataclass(frozen=True)
class Parent:
    """The question that a variant was made from."""

    question: str
    answer: str
    solution: str | None


class Parents:
    """The parents of a round's variants, by id; Arrow's columns, since there may be as many as questions.

    Parameters
    ----------
    tables
        Of questions: rows of earlier pools.
    """

    def __init__(self, tables: Sequence[Any]) -> None:
        import pyarrow as pa

        self._rows: Any = pa.concat_tables(tables) if tables else pa.table({"question_id": []})
        self._places = {id: place for place, id in enumerate(self._rows["question_id"].to_pylist())}

    def __getitem__(self, id: str) -> Parent:
        row = {name: self._rows[name][self._places[id]].as_py() for name in ("question", "answer", "solution")}
        return Parent(**row)


def schema() -> Any:
    """Of a parquet file of texts, as `hpc_rl.training.data.texts` reads it."""
    import pyarrow as pa

    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.schema(
        [("text_id", pa.string()), ("prompt", chat), ("completion", pa.string()), ("weight", pa.float64())]
    )
