"""Gathering a number for each row of a forward pass where ranks have different numbers of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def uneven_rows(accelerator: Any, rows: Sequence[int]) -> Iterator[None]:
    """Let `accelerator.gather` take tensors of different lengths, and leave fillers' rows out of what it returns.

    TRL gathers numbers for its metrics so, and takes for granted that all ranks' passes are full. Where they are not,
    gloo aborts and NCCL waits for ever.

    Parameters
    ----------
    rows
        By rank the rows of this pass, the same on all ranks; 0 for one that has a single filler.
    """
    if len(set(rows)) <= 1:
        yield
        return
    plain = accelerator.gather
    there = [max(1, count) for count in rows]

    def gather(tensor: Any) -> Any:
        if not torch.is_tensor(tensor) or tensor.dim() == 0:
            return plain(tensor)
        lengths = plain(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        longest, kept = max(lengths), rows if lengths == there else lengths
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat([part[:count] for part, count in zip(plain(padded).split(longest), kept, strict=True)])

    accelerator.gather = gather
    try:
        yield
    finally:
        del accelerator.gather
