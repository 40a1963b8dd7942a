"""Losses of a reward model on the labelled solutions of questions: a right one is to score above a wrong one.

Three of them, for one question with n solutions of which k are right, r⁺ the scores of these and r⁻ of the others:

- pairs: −1/(k(n−k)) Σ log σ(r⁺ − r⁻) over all pairs (A4; Kirchner et al. 2024, arXiv:2407.13692, V10). With n = 2 it
  is Bradley and Terry's, which TRL trains on
- selected: the mean of two terms −log σ(r⁺ − r⁻): the lowest right score against the highest wrong one, and one pair
  at random (A4)
- bce: the mean over solutions of the cross-entropy of σ(r) with the label (V10, T9)

and a penalty λ · mean r², which keeps scores near 0 (V10). All are means over questions, so each counts alike, however
many of its solutions are labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

Loss = Literal["pairs", "selected", "bce"]


def loss(
    kind: Loss,
    scores: torch.Tensor,
    labels: torch.Tensor,
    sizes: Sequence[int],
    *,
    penalty: float = 0.0,
    draws: Sequence[float] = (),
) -> torch.Tensor:
    """The mean over questions, a scalar on the scores' device.

    Parameters
    ----------
    kind
        Which loss.
    scores
        (R,) float32 scores of all solutions, question after question.
    labels
        (R,) 1 for right, 0 for wrong, on the CPU: what is paired is decided there.
    sizes
        Solutions of each question; they sum to R.
    penalty
        λ.
    draws
        Of `selected`: for each question a number in [0, 1), which says which of its pairs is the random one.
    """
    means = torch.cat([torch.full((size,), 1 / (size * len(sizes))) for size in sizes]).to(scores.device)
    if kind == "bce":
        terms = binary_cross_entropy_with_logits(scores, labels.to(scores), reduction="none")
        found = (means * terms).sum()
    else:
        pairs = pairs_of(labels, sizes)
        weights = _each(pairs) if kind == "pairs" else _selected(pairs, scores.detach().cpu(), draws)
        counted = torch.block_diag(*weights).to(scores)  # type: ignore[no-untyped-call]
        found = -(counted / len(sizes) * logsigmoid(margins(scores))).sum()
    return found + penalty * (means * scores**2).sum() if penalty else found


def margins(scores: torch.Tensor) -> torch.Tensor:
    """(R, R): by how much the score of each row is above that of each column."""
    return scores[:, None] - scores[None, :]


def pairs_of(labels: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """For each question (n, n): True where the row's solution is right and the column's wrong."""
    return [(right[:, None] & ~right[None, :]) for right in torch.split(labels.bool(), list(sizes))]


def _each(pairs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each pair counts: all of a question's alike, 1 together; nothing where all are right or all wrong."""
    return [block.float() / block.sum().clamp(min=1) for block in pairs]


def _selected(pairs: Sequence[torch.Tensor], scores: torch.Tensor, draws: Sequence[float]) -> list[torch.Tensor]:
    """Half for the pair with the least margin, half for the one that was drawn."""
    found = []
    for block, own, draw in zip(pairs, torch.split(scores, [len(block) for block in pairs]), draws, strict=True):
        weights = torch.zeros(block.shape)
        places = block.nonzero()
        if len(places):
            hardest = margins(own).masked_fill(~block, torch.inf).argmin()
            weights.view(-1)[hardest] += 0.5
            weights[tuple(places[int(draw * len(places))])] += 0.5
        found.append(weights)
    return found
