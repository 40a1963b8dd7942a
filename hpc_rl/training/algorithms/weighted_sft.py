"""Supervised fine-tuning in which each text has a weight, such as S17's U = exp(−(s − ½)² / (2 · 0.2²)) for a success
rate s of a generated question.

The loss is −Σ wᵢ log π(tokens of text i) / (completion tokens of the optimizer step): weights are factors of the
log-likelihoods, as in the paper, and not of the normaliser, so with all weights 1 it is that of `sft`, and with all
weights ½ half of it. A weight of 0 leaves a text out, but its tokens still count.
"""

from __future__ import annotations

from typing import Any

from hpc_rl.training.algorithms.sft import Sft, fit
from hpc_rl.training.base import Tensors
from hpc_rl.training.run import Trained, TrainRun


class WeightedSft(Sft):
    """`Sft` with `weights` in its batches: (B, L), of each label."""

    def compute_loss(self, model: Any, inputs: Tensors, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, which is linear in log-probabilities, with weighted ones."""
        weights = inputs.pop("weights")[:, 1:]

        def weighted(**tensors: Any) -> Any:
            out = model(**tensors)
            out.log_probs = out.log_probs * weights
            return out

        return super().compute_loss(weighted, inputs, *args, **kwargs)


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    return fit(run, WeightedSft, weighted=True)
