"""One training of a round on one rank: settings, model, trainer, the checkpoint to go on from, final weights."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from hpc_rl.config.lewis import LewisConfig
from hpc_rl.data.lewis import GameRow
from hpc_rl.engines.base import banned_ids
from hpc_rl.engines.loading import load_processor
from hpc_rl.engines.weights import weights_hash
from hpc_rl.run.seeds import derive
from hpc_rl.training import export, policy, settings
from hpc_rl.training.checkpoints import Checkpoints, sync_files
from hpc_rl.training.distributed import World, barrier, broadcast_object
from hpc_rl.training.grpo import Grpo
from hpc_rl.training.leaving import EXIT_TERMINATED, Leaving
from hpc_rl.training.reporting import Reporter, Saving

log = logging.getLogger(__name__)

VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Start:
    """What a round's training begins with: the policy's weights, the game of a row id, and where its pictures lie."""

    base: str
    adapter: Path | None
    weights: str
    row_of: Callable[[str], GameRow]
    image_root: Path


@dataclass(frozen=True)
class Places:
    """Where one training writes. `token` is unique to the claim under which it runs."""

    checkpoints: Path
    final: Path
    tensorboard: Path | None
    token: str


@dataclass(frozen=True)
class Trained:
    """What came of it, on rank 0: the hash of the final weights, and numbers for the manifest."""

    weights: str
    metrics: Mapping[str, Any]


@dataclass
class RoundTraining:
    """Everything that trainings on stored and on live rollouts have in common. All ranks do the same with theirs."""

    config: LewisConfig
    round: int
    world: World
    leaving: Leaving
    start: Start
    places: Places
    progress: Callable[[int, int], None]
    still_ours: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_from: int = 0

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed config."""
        return settings.deepspeed_config(self.config.train.deepspeed)

    def processor(self) -> Any:
        """Tokenizer and image processor, with the run's pixel limits (L19)."""
        speaker = self.config.speaker
        return load_processor(self.start.base, speaker.min_pixels, speaker.max_pixels)

    def model(self, tokenizer: Any) -> Any:
        """The policy. The trainer's settings must have been made: with ZeRO-3 they decide how it is loaded."""
        seed = derive(self.config.run.seed, self.round, "adapter")
        set_seed(seed)
        model = policy.load_policy(
            self.config.speaker, self.start.base, self.start.adapter, deepspeed=self.deepspeed is not None, seed=seed
        )
        policy.ban(model, banned_ids(self.start.base, tokenizer))
        return model

    def initial_model(self, tokenizer: Any) -> Any:
        """The model that KL is measured to, where it is not the policy without its adapter."""
        model = policy.load_initial_model(self.config.speaker)
        policy.ban(model, banned_ids(self.start.base, tokenizer))
        return model

    def trainer_parts(self, tokenizer: Any, checkpoints: Checkpoints) -> dict[str, Any]:
        """Arguments that every trainer takes."""
        self._reporter = Reporter(self.places.tensorboard if self.world.is_main else None, self.progress)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._saving = Saving(self.config.train.save_steps, self.leaving, device)

        def seal(folder: Path) -> None:
            sync_files(folder)
            barrier()
            if self.world.is_main:
                checkpoints.seal(folder, self.config.train.keep_checkpoints)
            barrier()  # a rank that leaves now would take rank 0 with it (srun --kill-on-bad-exit)

        return {
            "beta": self.config.train.beta,
            "initial_model": lambda: self.initial_model(tokenizer),
            "seal": seal,
            "callbacks": [self._reporter, self._saving],
        }

    def remove_checkpoints(self) -> None:
        """Remove the intermediate checkpoints: the final weights are verified and have their manifest (L23)."""
        Checkpoints(self.places.checkpoints, self.places.token, "").remove()

    def checkpoints(self, work: str) -> Checkpoints:
        """The stage's checkpoints; `work` is the fingerprint of what is trained on."""
        train = self.config.train.model_dump(mode="json", exclude={"save_steps", "keep_checkpoints", "backend"})
        same = {
            "work": work, "round": self.round, "weights": self.start.weights, "ranks": self.world.size, "train": train,
            "speaker": self.config.speaker.model_dump(mode="json", exclude={"path"}), "deepspeed": self.deepspeed,
            "seed": self.config.run.seed, "temperature": self.config.sample.temperature,
        }  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        checkpoints = Checkpoints(self.places.checkpoints, self.places.token, fingerprint)
        if self.world.is_main:
            checkpoints.create()
        barrier()
        return checkpoints

    def run(self, trainer: Grpo, checkpoints: Checkpoints) -> Trained | None:
        """Train to the end and write the final weights.

        None on ranks other than 0, and on rank 0 when the round was taken over meanwhile: then nothing was changed.

        Raises
        ------
        SystemExit
            When told to leave before the last step; a checkpoint was made.
        """
        found = broadcast_object(checkpoints.latest() if self.world.is_main else None)
        if found is not None:
            self.resumed_from = found.step
            log.info("continuing after step %d: %s", found.step, found.folder)
        began = time.monotonic()
        with self.leaving.deferred():
            trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
        if self._saving.leave:
            raise SystemExit(EXIT_TERMINATED)
        self.leaving.leave_if_asked()
        self.seconds["training"] = time.monotonic() - began
        return self._finish(trainer)

    def _finish(self, trainer: Grpo) -> Trained | None:
        began = time.monotonic()
        state = export.gather(trainer)
        result = None
        if state is not None:
            final, token = self.places.final, self.places.token
            model = trainer.accelerator.unwrap_model(trainer.model)
            try:
                folder = export.write(model, trainer.processing_class, state, final, token, self.config.speaker.dtype)
                weights = weights_hash(folder)
                if export.put_in_place(folder, final, token, self.still_ours):
                    self.seconds["exporting"] = time.monotonic() - began
                    result = Trained(weights, self._metrics(trainer))
                    log.info("%s is written and was loaded once, weights %s", final, weights[:16])
            finally:
                export.remove_temporary(final, token)
        barrier()
        return result

    def _metrics(self, trainer: Grpo) -> dict[str, Any]:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        means = {
            name: sum(values) / len(values)
            for name in sorted({name for entry in steps for name in entry})
            if (values := [float(entry[name]) for entry in steps if isinstance(entry.get(name), int | float)])
        }
        kept = {
            "loss": "mean_loss", "kl": "mean_kl", "entropy": "mean_entropy", "grad_norm": "mean_grad_norm",
            "clip_ratio/region_mean": "mean_clip_ratio", "completions/mean_length": "mean_length",
            "frac_reward_zero_std": "mean_share_of_equal_groups",
        }  # fmt: skip
        at_first = {
            "clip_ratio/region_mean": "first_step_clip_ratio",
            "sampling/logprob_difference_mean": "first_step_logprob_difference_mean",
            "sampling/logprob_difference_max": "first_step_logprob_difference_max",
        }
        return {
            "steps": trainer.state.global_step,
            "resumed_from_step": self.resumed_from,
            "ranks": self.world.size,
            **{ours: means[theirs] for theirs, ours in kept.items() if theirs in means},
            **{ours: float(steps[0][theirs]) for theirs, ours in at_first.items() if steps and theirs in steps[0]},
            "last_learning_rate": float(steps[-1]["learning_rate"]) if steps else 0.0,
            "last_loss": float(steps[-1]["loss"]) if steps else 0.0,
            "trained_parameters": sum(policy.size(p) for p in trainer.model.parameters() if p.requires_grad),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
