"""Texts of batches, for people: some with each logged step in TensorBoard, and all in a rank's debug file (L24)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_rl.engines.loading import tokenizer_of

KEPT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "input_ids", "attention_mask", "labels",
        "advantages", "weights", "question", "label", "score")  # fmt: skip
"""Keys of a batch that texts are made from (`hpc_rl.training.data.collate`)."""
NUMBERS = ("advantages", "weights", "label", "score")
"""Keys of a batch that say what a row is worth."""
_REPEATED = re.compile(r"(<[^<>\s]+>)\1{3,}")
"""A picture is hundreds of equal tokens."""


@dataclass(frozen=True)
class Shown:
    """A row of a batch: whose it is and what it is worth, its prompt, and the text that is learned from."""

    title: str
    prompt: str
    completion: str

    def markdown(self) -> str:
        """As TensorBoard shows it: texts as code, for they are anything."""
        blocks = (f"    {text}".replace("\n", "\n    ") for text in (self.prompt, self.completion) if text)
        return "\n\n---\n\n".join([self.title, *blocks])


class Samples:
    """What a rank's batches hold.

    Parameters
    ----------
    most
        How many texts of a logged step are shown.
    debug
        File for all of them (L24), or None.
    """

    def __init__(self, most: int = 0, debug: Path | None = None) -> None:
        self._most, self._debug = most, debug
        self._first: tuple[dict[str, Any], tuple[str, ...]] | None = None

    def saw(self, batch: Mapping[str, Any], units: tuple[str, ...], step: int, processor: Any) -> None:
        """Take note of a batch; `units` are the ids of what is in it, none where the trainer samples by itself."""
        if self._most and self._first is None:
            self._first = {name: batch[name] for name in KEPT if name in batch}, units
        if self._debug is not None and units:  # what is sampled live is written where it is judged
            with self._debug.open("a") as file:
                for row in shown(batch, units, processor):
                    file.write(f"---- step {step} {row.title}\n{row.completion}\n")

    def take(self, processor: Any) -> list[Shown]:
        """Texts of the first batch since they were taken last."""
        if self._first is None:
            return []
        (batch, units), self._first = self._first, None
        return shown(batch, units, processor, self._most)


def shown(batch: Mapping[str, Any], units: Sequence[str], processor: Any, most: int | None = None) -> list[Shown]:
    """The first rows of a batch as text, without fillers."""
    tokenizer, rows = tokenizer_of(processor), []
    for number, (prompt, completion) in enumerate(_rows(batch)):
        if len(completion):
            texts = (_REPEATED.sub(r"\1…", tokenizer.decode(ids)) for ids in (prompt, completion))
            rows.append(Shown(_title(batch, units, number), *texts))
        if len(rows) == most:
            break
    return rows


def _rows(batch: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids of each row's prompt, and of what is learned from: all of it, where nothing is masked."""
    if "prompt_ids" in batch:
        prompts, completions = (
            [ids[mask.bool()] for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)]
            for name in ("prompt", "completion")
        )
        return list(zip(prompts, completions, strict=True))
    ids = batch["input_ids"]
    there = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    learned = there
    if "completion_mask" in batch:
        learned = batch["completion_mask"].bool()
    elif "labels" in batch:
        learned = batch["labels"] >= 0
    return [(row[real & ~part], row[real & part]) for row, real, part in zip(ids, there, learned, strict=True)]


def _title(batch: Mapping[str, Any], units: Sequence[str], number: int) -> str:
    """Whose a row is, as far as the batch says, and what it is worth."""
    if "question" in batch:
        said = [units[int(batch["question"][number])]]
    elif "completion_mask" in batch and "input_ids" in batch:  # pairs: all chosen answers, then all rejected ones
        half = len(batch["input_ids"]) // 2
        said = [units[number % half], "chosen" if number < half else "rejected"]
    else:
        said = [units[number]] if number < len(units) else []
    worth = {name: batch[name][number] for name in NUMBERS if name in batch}
    return ", ".join([*said, *(f"{name} {float(value.reshape(-1)[0]):.4g}" for name, value in worth.items())])
