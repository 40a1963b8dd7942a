"""Pairs that are not trained on, measured before and after: does what was learned hold for other questions?

Their answers are scored by the model that training begins with, which is DPO's reference (S6), and by the trained one.
With x = β[Δ log π − Δ log π_ref] of a pair, Δ between its chosen and its rejected answer:

    loss        mean −log σ(x): DPO's term alone; log 2 before training, when π is π_ref
    accuracy    share of pairs with x > 0
    margin      mean x
    preferred   share of pairs whose chosen answer is the likelier one, Δ log π > 0: before and after
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_rl.training import logprobs
from hpc_rl.training.base import Tensors
from hpc_rl.training.logprobs import Loaded, Scoring
from hpc_rl.training.ranks.distributed import all_gather_objects
from hpc_rl.training.reporting.reporter import Reporter

KNOWN = ("ref_chosen_logps", "ref_rejected_logps")
"""Keys of a batch: what the reference says, as in the batches of DPO."""


@dataclass(frozen=True)
class Validation:
    """What is measured.

    Attributes
    ----------
    scoring
        The pairs, whose batches have `KNOWN` too.
    beta
        DPO's β.
    """

    scoring: Scoring
    beta: float

    def measure(self, trainer: Any, reporter: Reporter) -> dict[str, float]:
        """The numbers for the manifest; the log and TensorBoard get them too. All ranks must call it, at the end.

        Parameters
        ----------
        trainer
            Its model as training runs it: with ZeRO-3 and FSDP a part is on each rank.
        """
        table = self._score(trainer)
        before, after = measured(table[:, :2], table[:, 2:], self.beta)
        reporter.add("validation", {0: before, trainer.state.global_step: after})
        return {
            "validation_pairs": len(table),
            **{f"validation_{name}": value for name, value in after.items()},
            "validation_preferred_before": before["preferred"],
        }

    def _score(self, trainer: Any) -> NDArray[np.float64]:
        """(N, 4) of all pairs: log-probabilities of chosen and rejected under the trained model, and the reference."""
        model = trainer.model_wrapped
        dtype = trainer.args.hf_deepspeed_config.dtype() if trainer.is_deepspeed_enabled else torch.float32
        model.eval()
        rows: list[NDArray[np.float32]] = []
        with torch.no_grad():
            for _, _, values in logprobs.score(
                Loaded(model, trainer.accelerator.device, dtype), replace(self.scoring, forward=_both)
            ):
                rows.extend(values)
        return np.stack([row for ours in all_gather_objects(rows) for row in ours]).astype(np.float64)


def measured(
    now: NDArray[np.float64], reference: NDArray[np.float64], beta: float
) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of the formulas above, before and after training.

    Parameters
    ----------
    now, reference
        (N, 2) log-probabilities of chosen and rejected answers, under the trained model and under the reference.
    """
    before, after = (table[:, 0] - table[:, 1] for table in (reference, now))
    x = beta * (after - before)
    return {"loss": float(np.log(2)), "preferred": float((before > 0).mean())}, {
        "loss": float(np.logaddexp(0.0, -x).mean()),
        "accuracy": float((x > 0).mean()),
        "margin": float(x.mean()),
        "preferred": float((after > 0).mean()),
    }


def _both(model: Any, batch: Tensors) -> list[NDArray[np.float32]]:
    """(4,) of each pair: under the model, chosen and rejected, then under the reference."""
    known = torch.stack([batch.pop(name) for name in KNOWN], dim=1).cpu().numpy()
    return [np.concatenate(both) for both in zip(logprobs.pairs(model, batch), known, strict=True)]
