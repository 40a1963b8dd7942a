"""GRPO on stored rollouts, through TRL's trainer (Shao et al. 2024, arXiv:2402.03300; TRL 1.16).

    A = (r − mean) / (std + 1e-4) within the group of a prompt          ρ = π(t) / π_old(t) of a token t
    L = Σ − min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) + β (π_ref / π − log π_ref / π − 1), averaged as `loss_type` says

`correction: clip` takes the log-probabilities that the samples were drawn with for π_old's. So the importance ratio
corrects for everything between sampling and now: updates of this round, and differences between engines. In the first
step it is 1 if tokens, pictures and ranks line up. For truncate and mask see `hpc_rl.training.algorithms.corrections`.

Where we differ from TRL: samples whose grading failed are no rows of a batch instead of rows with advantage 0; groups
whose rewards are equal are left out, so dapo's number of tokens does not count theirs (`drop_equal_groups: false` keeps
them); a mean over rows (grpo, dr_grpo) is over those of the whole optimizer step. bnpo averages over the tokens of each
forward pass, as in TRL, and each pass counts by its rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hpc_rl.config.training import GrpoTrainConfig
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.training import logprobs
from hpc_rl.training.algorithms import stored
from hpc_rl.training.algorithms.corrections import Corrected, Reference
from hpc_rl.training.algorithms.grpo_base import Grpo, beside, grpo_config, options_of
from hpc_rl.training.algorithms.stored import Stored, reference_weights, scoring, units_of
from hpc_rl.training.base import Tensors
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.data.batches import Batches, Maker
from hpc_rl.training.data.collate import Advantages
from hpc_rl.training.data.plan import Plan
from hpc_rl.training.data.rollouts import Rollout, Rollouts
from hpc_rl.training.run import Trained, TrainRun

__all__ = ["StoredGrpo", "reference_weights", "scoring", "train", "units_of"]


class StoredGrpo(Stored, Grpo):
    """GRPO on exactly the samples of a plan.

    Parameters
    ----------
    weighted
        Whether batches have weights for the difference between engines (`importance_sampling_ratio`).
    """

    def __init__(self, *, weighted: bool, **others: Any) -> None:
        super().__init__(**others)
        if weighted:  # outside of generation, which is not done here, TRL reads these two in its loss only
            self.use_vllm = self.vllm_importance_sampling_correction = True

    def _prepare_inputs(self, batch: Tensors) -> Tensors:
        """Tensors to the device; with `reference: live`, the log-probabilities under the initial model."""
        moved: Tensors = super()._prepare_inputs(batch)
        if self.beta and "ref_per_token_logps" not in moved:
            moved["ref_per_token_logps"] = self._reference_logprobs(moved)
        return moved

    @torch.no_grad()
    def _reference_logprobs(self, batch: Tensors) -> torch.Tensor:
        """(B, T) log-probabilities under the initial model."""
        if self.ref_model is not None:
            model: Any = self.ref_model
            adapter: AbstractContextManager[Any] = nullcontext()
        else:
            model = self.model_wrapped
            adapter = self.accelerator.unwrap_model(self.model).disable_adapter()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with adapter:
            found: torch.Tensor = Grpo._get_per_token_logps_and_entropies(
                self, model, ids, mask, batch["completion_ids"].size(1), **{name: batch.get(name) for name in names}
            )[0]
        return found


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    began = time.monotonic()
    rollouts = stored.read(run)
    made = stored.make_plan(run, rollouts)
    checkpoints = run.checkpoints(made.fingerprint())
    return stored.finish(run, trainer_of(run, rollouts, made, checkpoints), checkpoints, began)


def trainer_of(
    run: TrainRun,
    rollouts: Rollouts,
    made: Plan[Rollout],
    checkpoints: Checkpoints,
    kind: Callable[..., StoredGrpo] = StoredGrpo,
    batches: Callable[..., Batches] = Batches,
) -> StoredGrpo:
    """The trainer of a plan; `kind` makes it, after its settings, `batches` the batches from plan, rank and makers."""
    options = options_of(run)
    assert isinstance(options, GrpoTrainConfig)
    args = grpo_config(run, checkpoints.own)
    tensors = stored.tensors(run)
    asked = stored.scoring_of(run, rollouts, tensors)
    makers: list[Maker] = [tensors, Advantages(rollouts, options.scale_rewards)]
    if options.correction != "clip":
        old = logprobs.by_pass(run, checkpoints, run.start, asked)
        makers.append(Corrected(old, options.correction, options.correction_cap))
    if options.beta and options.reference != "live":
        makers.append(Reference(logprobs.reference(run, checkpoints, reference_weights(run), asked)))
    processor = run.processor()
    tokenizer = tokenizer_of(processor)
    return kind(
        weighted=options.correction != "clip", plan=made, rollouts=rollouts,
        batches=batches(made, run.world.rank, *makers), parts=list(run.task.rewards), args=args,
        model=run.model(tokenizer), processor=processor, beta=options.beta,
        initial_model=beside(run) if options.reference == "live" else None,
        **run.driving(checkpoints),
    )  # fmt: skip
