"""One training of a round on one rank: model, checkpoints to go on from, final weights; it knows no algorithm."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate.utils import set_seed

from hpc_rl.cluster.entry import STARTED
from hpc_rl.cluster.failures import EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.config.modeling import VisionModelConfig
from hpc_rl.engines.base import banned_ids
from hpc_rl.engines.loading import load_processor
from hpc_rl.engines.memory import note_notches
from hpc_rl.engines.weights import Weights, noted_hash
from hpc_rl.orchestrate.job import Job
from hpc_rl.run.seeds import derive
from hpc_rl.training import acceleration, models, settings
from hpc_rl.training.checkpointing.checkpoints import Checkpoint, Checkpoints
from hpc_rl.training.checkpointing.saving import Saving
from hpc_rl.training.checkpointing.sealing import Sealing
from hpc_rl.training.data.plan import Shape
from hpc_rl.training.errors import CheckpointFailed, Diverged, UnusableData
from hpc_rl.training.finishing import Final, numbers, put_all_in_place
from hpc_rl.training.ranks.distributed import World, barrier, broadcast_object
from hpc_rl.training.ranks.leaving import EXIT_GRACE_S, Leaving
from hpc_rl.training.reporting.reporter import Reporter
from hpc_rl.training.reporting.samples_log import Samples
from hpc_rl.training.second import Second
from hpc_rl.training.task import Data, TrainTask
from hpc_rl.training.validation import Validation

log = logging.getLogger(__name__)

NOT_IN_A_CHECKPOINT = {
    "save_steps", "save_minutes", "keep_checkpoints", "backend", "preflight_s",
    "per_device_batch_size", "gradient_accumulation_steps", "export", "fused_kernels", "log_completions",
    "deepspeed", "fsdp",
}  # fmt: skip
"""Settings that may change between a checkpoint and its continuation; of batch and accumulation the product counts, and
of files what is in them."""
DRAWN_WITH = {"temperature", "max_tokens", "samples_per_prompt"}
"""Of sampling, what may not: live samples are drawn so, and losses divide by them."""


@dataclass(frozen=True)
class Places:
    """Where one training writes.

    Attributes
    ----------
    checkpoints, final, second, tensorboard
        Folders; `second` for the final weights of the task's second model.
    token
        Unique to the claim under which it runs.
    output
        The path of one more output of the stage, whose name ends as said.
    debug
        File for this rank's raw completions and rewards (L24), or None.
    """

    checkpoints: Path
    final: Path
    tensorboard: Path | None
    token: str
    output: Callable[[str], Path]
    debug: Path | None
    second: Path | None = None

    @property
    def models(self) -> list[Path]:
        """Folders of final weights."""
        return [self.final, *([self.second] if self.second else [])]


@dataclass(frozen=True)
class Trained:
    """What came of it, on rank 0: hashes of the final weights, numbers for the manifest, and other outputs.

    `kept` says why the weights are those that it began with, and no new ones were written; '' where they are new.
    """

    weights: str
    metrics: Mapping[str, Any]
    outputs: Sequence[Path] = ()
    second: str | None = None
    kept: str = ""


@dataclass
class TrainRun:
    """What all trainings have in common. All ranks do the same with theirs.

    Attributes
    ----------
    job, task
        The run, and what is asked of this stage.
    world, leaving
        Which rank this is, and whether it was told to leave.
    start, second
        The weights that it begins with, and those of the task's second model.
    places
        Where it writes.
    progress
        Called with optimizer steps done and in all.
    still_ours
        Whether the claim holds and nobody has committed the stage.
    notches
        After how many times of running out of memory the task's settings are what they are.
    deadline
        When the job must have left.
    got_further
        Something was written that the next attempt goes on from, other than a checkpoint.
    """

    job: Job
    task: TrainTask
    world: World
    leaving: Leaving
    start: Weights
    places: Places
    progress: Callable[[int, int], None]
    still_ours: Callable[[], bool]
    second: Weights | None = None
    notches: int = 0
    deadline: Deadline = field(default_factory=lambda: Deadline.of(os.environ))
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_from: int = 0
    got_further: bool = False
    _noted: bool = False
    _saving: Saving | None = None
    _seal: Sealing | None = None
    _began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.leaving.in_vain = self.in_vain

    @property
    def round(self) -> int:
        """The round."""
        return self.job.round

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """The DeepSpeed config."""
        return settings.deepspeed_config(self.task)

    @property
    def shape(self) -> Shape:
        """The size of an optimizer step on the ranks that there are."""
        options = self.task.settings
        return Shape(self.world.size, options.gradient_accumulation_steps, options.per_device_batch_size)

    def files(self, data: Data | None = None) -> Iterator[Path]:
        """The task's data, or others, shard by shard. A generator: only who goes through it reads manifests."""
        data = data or self.task.data
        assert data is not None
        for manifest in self.job.inputs(data.stage.round, data.stage.name):
            yield manifest.path(data.file)

    def processor(self) -> Any:
        """Tokenizer, or processor with the run's pixel limits (L19) of a model that sees."""
        model = self.task.role.model
        limits = (model.min_pixels, model.max_pixels) if isinstance(model, VisionModelConfig) else (None, None)
        return load_processor(self.start.base, *limits)

    def model(self, tokenizer: Any | None, head: models.Head = "lm") -> Any:
        """What is trained. The trainer's settings must have been made: with ZeRO-3 they decide how it is loaded.

        Parameters
        ----------
        tokenizer
            Of a policy whose samples are trained on: what sampling bans (L26) is banned here. None: nothing is.
        """
        seed = derive(self.job.config.run.seed, self.round, "adapter")
        set_seed(seed)
        model = models.load(
            self.task.role.model, self.start.base, self.start.adapter,
            deepspeed=self.deepspeed is not None, seed=seed, head=head,
        )  # fmt: skip
        if tokenizer is not None and head == "lm":
            models.ban(model, banned_ids(self.start.base, tokenizer))
        return model

    def initial_model(self, tokenizer: Any) -> Any:
        """The model that KL is measured to, where it is not the policy without its adapter."""
        section = self.task.role.model
        model = models.load_frozen(section, str(section.path), None, deepspeed=self.deepspeed is not None)
        models.ban(model, banned_ids(self.start.base, tokenizer))
        return model

    def driving(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Arguments that every trainer takes, `batches` apart (`hpc_rl.training.base.Driven`)."""
        options = self.task.settings
        shown, board = (options.log_completions, self.places.tensorboard) if self.world.is_main else (0, None)
        self._reporter = Reporter(board, self._progressed, Samples(shown, self.places.debug))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        lag_s, first_here = self.job.config.cluster.file_system_lag_s, self.world.local_rank == 0
        self._seal = seal = Sealing(checkpoints, self.world.is_main, lag_s, first_here)
        self._saving = Saving(
            options, self.leaving, self.deadline, seal.check_room, stage=self.job.stage.name, device=device
        )
        return {"seal": seal, "reporter": self._reporter, "callbacks": [self._saving]}

    def _progressed(self, done: int, total: int) -> None:
        """Tell `status`; and, where a step went well with less memory, the next rounds, which begin with it."""
        self.progress(done, total)
        if self.notches and self.world.is_main and not self._noted:
            self._noted = True
            note_notches(self.job.ws, self.round, self.job.stage.name, {"notches": self.notches})

    def remove_checkpoints(self) -> None:
        """Remove the intermediate checkpoints: the final weights are verified and have their manifest (L23)."""
        Checkpoints(self.places.checkpoints, self.places.token, "").remove()

    def checkpoints(self, work: str) -> Checkpoints:
        """The stage's checkpoints; `work` is the fingerprint of what is trained on."""
        task, config = self.task, self.job.config
        notes = self.job.ws.root / "cache" / "weights"
        base = broadcast_object(noted_hash(Path(self.start.base), notes) if self.world.is_main else None)
        same = {
            "work": work, "round": self.round, "weights": self.start.hash, "base": base, "ranks": self.world.size,
            "units_of_a_step": self.shape.accumulation * self.shape.batch, "algorithm": task.algorithm,
            "settings": task.settings.model_dump(mode="json", exclude=NOT_IN_A_CHECKPOINT),
            "model": task.role.model.model_dump(mode="json", exclude={"path"}), "deepspeed": self.deepspeed,
            "fsdp": acceleration.fsdp_config(task.settings, task.section),
            "seed": config.run.seed, "rewards": dict(task.rewards),
            "sampling": task.sampling.model_dump(mode="json", include=DRAWN_WITH),
        }  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        checkpoints = Checkpoints(
            self.places.checkpoints, self.places.token, fingerprint, task.settings.keep_checkpoints, self.still_ours
        )
        if self.world.is_main:
            checkpoints.create()
        barrier()
        return checkpoints

    def train(
        self, trainer: Any, checkpoints: Checkpoints, second: Second | None = None,
        validation: Validation | None = None,
    ) -> Trained | None:  # fmt: skip
        """Train to the end, measure what is for validation, and write the final weights, those of a second model too.

        None on ranks other than 0, and on rank 0 when the round was taken over meanwhile: then nothing was changed.

        Raises
        ------
        Diverged, CheckpointFailed
            The message names the checkpoint that the next attempt goes on from.
        SystemExit
            When it had to leave before the final weights were written; a checkpoint was made.
        """
        found = broadcast_object(checkpoints.latest() if self.world.is_main else None)
        if found is not None:
            self.resumed_from = found.step
            ago_s = time.time() - found.written
            log.info("continuing after step %d, saved %.0f s ago: %s", found.step, ago_s, found.folder)
            if self._seal is not None:
                self._seal.expect(found.size)
        began = time.monotonic()
        try:
            with self.leaving.deferred():
                trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
        except (Diverged, CheckpointFailed) as error:
            raise type(error)(f"{error}. {_kept(checkpoints.latest())}") from error
        except Exception as error:
            if found is None or self._saving is None or self._saving.stepping or _not_for_its_content(error):
                raise
            why = f"{type(error).__name__}: {error}"
            then = checkpoints.distrust(found.folder, why)
            raise CheckpointFailed(f"{found.folder} looks whole, but cannot be gone on from ({why}). {then}") from error
        if self._saving is not None and self._saving.exit_code is not None:
            self._leave(self._saving.exit_code)
        self.leaving.leave_if_asked()
        self.seconds["training"] = time.monotonic() - began
        began = time.monotonic()
        measured = validation.measure(trainer, self._reporter) if validation is not None else {}
        self.seconds["validating"] = time.monotonic() - began
        return self._finish(trainer, second, measured)

    def in_vain(self) -> str:
        """Why it would lead nowhere to run the job again that leaves now; '' where it may get further."""
        had_s, life_s = time.time() - self._began, time.time() - float(os.environ.get(STARTED, self._began))
        got_further = self.got_further or (self._saving is not None and self._saving.saves > 0)
        if got_further or self.deadline.left_s() > 0 or had_s < life_s / 2:
            return ""
        return (
            f"neither a checkpoint nor the end was reached in the {had_s:.0f} s that this job had. Raise "
            f"stages.{self.job.stage.name}.time_min, or spread a step over more ranks with fewer "
            f"{self.task.section}.gradient_accumulation_steps"
        )

    def _leave(self, code: int) -> NoReturn:
        if code == EXIT_OUT_OF_TIME and not self.world.is_main:
            time.sleep(EXIT_GRACE_S)  # the first to leave ends all (srun), and rank 0's entry has yet to requeue
        raise SystemExit(code)

    def _finish(self, trainer: Any, second: Second | None, measured: Mapping[str, float]) -> Trained | None:
        began, task, places = time.monotonic(), self.task, self.places
        finals = [Final(trainer.model_wrapped, trainer.processing_class, task.role, places.final, task.settings.export)]
        if second is not None:
            assert task.second is not None and places.second is not None
            finals.append(Final(second.wrapped, second.tokenizer, task.second, places.second, second.export))
        hashes = put_all_in_place(finals, trainer.accelerator, places.token, self.still_ours)
        if hashes is None:
            return None
        self.seconds["exporting"] = time.monotonic() - began
        metrics = {
            **numbers(trainer),
            **measured,
            "resumed_from_step": self.resumed_from,
            "ranks": self.world.size,
            "preflight": self.world.preflight,
            "memory_notches": self.notches,
            "per_device_batch_size": self.shape.batch,
            "gradient_accumulation_steps": self.shape.accumulation,
            "checkpoints": self._saving.numbers() if self._saving else {},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        return Trained(hashes[0], metrics, second=hashes[1] if second is not None else None)


def _not_for_its_content(error: Exception) -> bool:
    """Whether reading a checkpoint fails for want of memory, of another rank, or of data to go on with."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | UnusableData | dist.DistError):
        return True
    return any(frame.filename == dist.distributed_c10d.__file__ for frame in traceback.extract_tb(error.__traceback__))


def _kept(checkpoint: Checkpoint | None) -> str:
    """What is left to go on from, for messages."""
    if checkpoint is None:
        return "There is no checkpoint before it: the next attempt begins anew"
    return f"The last good checkpoint is kept, and the next attempt goes on after its step: {checkpoint.folder}"
