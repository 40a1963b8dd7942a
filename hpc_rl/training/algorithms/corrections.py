"""Log-probabilities under other models than the one that is trained, as tensors of a batch of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_rl.training.base import Tensors
from hpc_rl.training.data.plan import Item, Step
from hpc_rl.training.data.rollouts import Rollout
from hpc_rl.training.scores import Scores


class Reference:
    """`ref_per_token_logps` (B, T): the initial model's, which KL is measured to."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def __call__(self, _step: Step[Rollout], items: Sequence[Item[Rollout]]) -> Tensors:
        """See `hpc_rl.training.data.batches.Batches`."""
        return {"ref_per_token_logps": _padded(self._scores.rows([item.unit.id for item in items]), items)}


class Corrected:
    """The old policy's log-probabilities as the engine that trains has them, and weights that make up for the sampler.

    The samples are those of the sampler, q, and the clipped loss expects those of the old policy, π. Weights π / q
    would make up for it exactly, with a variance without bounds, so they are cut off at a cap C:

    truncate    min(π(t) / q(t), C) of each token t (Yao et al. 2025, "Your efficient RL framework secretly brings you
                off-policy RL training")
    mask        of a whole completion w = Π π(t) / q(t), or 0 where w > C (Liu et al. 2025, "When speed kills stability:
                demystifying RL collapse from the training-inference mismatch")

    Both are TRL's (`vllm_importance_sampling_mode` token_truncate and sequence_mask). `old_per_token_logps` and
    `sampling_per_token_logps` are (B, T); `importance_sampling_ratio` is (B, T) or (B, 1), and so is `beyond_cap`.

    Parameters
    ----------
    scores
        Of the weights that the round begins with.
    """

    def __init__(self, scores: Scores, mode: Literal["truncate", "mask"], cap: float) -> None:
        self._scores, self._mode, self._cap = scores, mode, cap

    def __call__(self, _step: Step[Rollout], items: Sequence[Item[Rollout]]) -> Tensors:
        """See `hpc_rl.training.data.batches.Batches`."""
        old = _padded(self._scores.rows([item.unit.id for item in items]), items)
        sampled = _padded([item.unit.logprobs for item in items], items)
        difference = old - sampled
        if self._mode == "truncate":
            weights = difference.exp()
            beyond = weights > self._cap
            weights = weights.clamp(max=self._cap)
        else:
            weights = difference.sum(1, keepdim=True).exp()
            beyond = weights > self._cap
            weights = weights.masked_fill(beyond, 0.0)
        return {
            "old_per_token_logps": old, "sampling_per_token_logps": sampled, "importance_sampling_ratio": weights,
            "beyond_cap": beyond,
        }  # fmt: skip


def _padded(rows: Sequence[NDArray[np.float32]], items: Sequence[Item[Rollout]]) -> torch.Tensor:
    """(B, T) with zeros on the right, and for fillers."""
    own = [torch.tensor(row) * item.weight for row, item in zip(rows, items, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
