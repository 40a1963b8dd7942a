"""What is left of a training at its end: the final weights of its models, put in place together, and its numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.engines.weights import Role, weights_hash
from hpc_rl.training import models
from hpc_rl.training.exporting import consolidate, export
from hpc_rl.training.ranks.distributed import rank_0_alone

log = logging.getLogger(__name__)

MEANS = {
    "loss": "mean_loss", "kl": "mean_kl", "entropy": "mean_entropy", "grad_norm": "mean_grad_norm",
    "clip_ratio/region_mean": "mean_clip_ratio", "completions/mean_length": "mean_length",
    "frac_reward_zero_std": "mean_share_of_equal_groups", "throughput/step_s": "mean_step_s",
    "throughput/tokens_per_s": "mean_tokens_per_s", "throughput/mfu_percent": "mean_mfu_percent",
    "sampling/importance_ratio_mean": "mean_importance_ratio", "sampling/beyond_cap": "mean_beyond_cap",
    "rewards/accuracies": "mean_accuracy", "accuracy": "mean_accuracy", "margin": "mean_margin",
    "loss/policy": "mean_policy_loss", "loss/reward_model": "mean_reward_model_loss",
    "reward_model/accuracy": "mean_reward_model_accuracy",
}  # fmt: skip
PEAKS = {"memory/gpu_peak_gib": "peak_gpu_gib", "memory/host_peak_gib": "peak_host_gib"}
AT_FIRST = {
    "loss": "first_loss",
    "clip_ratio/region_mean": "first_step_clip_ratio",
    "sampling/logprob_difference_mean": "first_step_logprob_difference_mean",
    "sampling/logprob_difference_max": "first_step_logprob_difference_max",
}
"""Names in the manifest of what the trainer logs: means over all steps, the largest, those of the first step."""


@dataclass(frozen=True)
class Final:
    """A model whose training is over: as it was run, its processor, whose it is, where it goes, and as what."""

    wrapped: Any
    processor: Any
    role: Role
    target: Path
    export: export.Export


def put_all_in_place(
    finals: Sequence[Final], accelerator: Any, token: str, still_ours: Callable[[], bool]
) -> list[str] | None:
    """Write and verify all folders, then give them their names. All ranks must call it.

    Parameters
    ----------
    finals
        The models.
    accelerator
        Of the trainer.
    token, still_ours
        Of the claim, as for `export.put_in_place`.

    Returns
    -------
    list of str or None
        The hash of each model's weights; None on ranks other than 0, and where the work is no longer ours.
    """
    try:
        written = [_write(accelerator, final, token) for final in finals]
        with rank_0_alone("final weights are put in place"):
            hashes = [weights_hash(folder) for folder in written if folder is not None]
            placed = [
                folder is not None and export.put_in_place(folder, final.target, token, still_ours)
                for folder, final in zip(written, finals, strict=True)
            ]
    finally:
        if accelerator.is_main_process:
            for final in finals:
                export.remove_temporary(final.target, token)
    if not all(placed):
        return None
    for final, weights in zip(finals, hashes, strict=True):
        log.info("%s is written and was loaded once, weights %s", final.target, weights[:16])
    return hashes


def _write(accelerator: Any, final: Final, token: str) -> Path | None:
    """A model's folder under a temporary name, on rank 0."""
    trained = consolidate.gather(accelerator, final.wrapped, final.processor)
    with rank_0_alone("final weights are written and verified"):
        if trained is None:
            return None
        return export.write(trained, final.target, token, dtype=final.role.model.dtype, export=final.export)


def numbers(trainer: Any) -> dict[str, Any]:
    """What the trainer's log says of all its steps, those before it was resumed too.

    A logged number is the mean since the one before, and counts for as many steps.
    """
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    series: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    last = 0
    for entry in steps:
        for name, value in entry.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append(float(value))
                counts.setdefault(name, []).append(entry["step"] - last)
        last = entry["step"]
    return {
        "steps": trainer.state.global_step,
        **{ours: _mean(series[name], counts[name]) for name, ours in MEANS.items() if name in series},
        **{ours: max(series[name]) for name, ours in PEAKS.items() if name in series},
        **{ours: float(steps[0][name]) for name, ours in AT_FIRST.items() if steps and name in steps[0]},
        "last_learning_rate": series.get("learning_rate", [0.0])[-1],
        "last_loss": series.get("loss", [0.0])[-1],
        "trained_parameters": sum(models.size(p) for p in trainer.model.parameters() if p.requires_grad),
    }


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
