"""How far the policy is from the one that sampled: what says whether these are its rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 50.0
"""Differences beyond it have the ratio e^50: larger ones end in infinity, which is no number for a manifest."""


@dataclass(frozen=True)
class FirstStep:
    """What one rank saw in the first optimizer step it did: are these the rollouts of this policy?

    Attributes
    ----------
    rank, step
        Who, and which step (not 0 where a checkpoint was continued).
    tokens
        Sampled tokens of its batches.
    logprob_difference_mean, logprob_difference_max
        |log π now − log π when sampled| per token.
    ratio_min, ratio_max
        Importance ratios.
    clipped
        Share of tokens whose ratio is outside of 1 ± ε.
    """

    rank: int
    step: int
    tokens: int
    logprob_difference_mean: float
    logprob_difference_max: float
    ratio_min: float
    ratio_max: float
    clipped: float

    @classmethod
    def of(cls, difference: torch.Tensor, low: float, high: float, *, rank: int, step: int) -> FirstStep:
        """From (N,) log π now − log π when sampled, and the range 1 − low … 1 + high of ratios that are not clipped."""
        ratio = difference.clamp(max=LARGEST).exp()
        far = (ratio < 1 - low) | (ratio > 1 + high)
        some = difference.numel() > 0
        return cls(
            rank=rank,
            step=step,
            tokens=difference.numel(),
            logprob_difference_mean=float(difference.abs().mean()) if some else 0.0,
            logprob_difference_max=float(difference.abs().max()) if some else 0.0,
            ratio_min=float(ratio.min()) if some else 1.0,
            ratio_max=float(ratio.max()) if some else 1.0,
            clipped=float(far.float().mean()) if some else 0.0,
        )


def of_batch(difference: torch.Tensor) -> torch.Tensor:
    """(6,) of a rank's batch, to be gathered for `summary`: see there. `difference` is that of `FirstStep.of`."""
    ratio = difference.clamp(max=LARGEST).exp()
    nothing = difference.new_zeros(1)
    return torch.stack([
        difference.abs().sum(), ratio.sum(), difference.new_tensor(float(difference.numel())),
        torch.cat([difference.abs(), nothing]).max(), torch.cat([ratio, nothing + 1]).max(),
        torch.cat([ratio, nothing + 1]).min(),
    ])  # fmt: skip


def summary(every: torch.Tensor) -> dict[str, float]:
    """Over (ranks, 6) of `of_batch`: means over tokens, largest and least."""
    every = every.float().cpu()
    tokens = float(every[:, 2].sum())
    means = {
        "sampling/logprob_difference_mean": float(every[:, 0].sum()) / tokens,
        "ratio/mean": float(every[:, 1].sum()) / tokens,
    } if tokens else {}  # fmt: skip
    return means | {
        "sampling/logprob_difference_max": float(every[:, 3].max()),
        "ratio/max": float(every[:, 4].max()),
        "ratio/min": float(every[:, 5].min()),
    }
