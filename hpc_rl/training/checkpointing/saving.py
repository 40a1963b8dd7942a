"""When a training saves: every so many steps and minutes, when it is told to leave, and before its time is up.

What a checkpoint costs is measured, not guessed: how long a step takes and how long a save, the slowest of the last.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hpc_rl.cluster.failures import EXIT_OUT_OF_TIME
from hpc_rl.cluster.walltime import Deadline
from hpc_rl.config.training import TrainConfig
from hpc_rl.training.errors import CheckpointFailed
from hpc_rl.training.ranks.leaving import EXIT_TERMINATED, Leaving

log = logging.getLogger(__name__)

LAST = 20
"""The slowest of the last so many steps, or saves, says how long the next one takes."""
WORTH = 20
"""Between two checkpoints that are made for the time's sake lies at least so many times what one costs: 5 %."""
REDONE_S = 60.0
"""What may be lost while the final weights are written: at most so many seconds, or twice what a checkpoint costs."""


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks for checkpoints, and for the end of training where there is no time for another step (all ranks).

    A job with a time limit makes one after its first step: then it knows what saving costs, and finds a disk that is
    full in its first minute. After the last step there is one where much would be lost if the job ended while the final
    weights are written: whoever goes on from it only has those to write.

    Parameters
    ----------
    options
        `save_steps` and `save_minutes`.
    leaving, deadline
        Whether this rank was told to leave; when the job will be.
    check_room
        Called on all ranks before a checkpoint is written.
    stage
        Name of the stage, for messages.
    device
        Where collectives take their tensors.
    clock
        Seconds that only go forward.

    Attributes
    ----------
    exit_code
        With which the process is to leave once training has ended, before anything else; else None.
    saves
        Checkpoints made.
    stepping
        Whether a step has begun: a checkpoint to go on from was read before.
    """

    def __init__(
        self,
        options: TrainConfig,
        leaving: Leaving,
        deadline: Deadline,
        check_room: Callable[[], None],
        *,
        stage: str,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options, self._leaving, self._deadline, self._check_room = options, leaving, deadline, check_room
        self._stage, self._device, self._clock = stage, device, clock
        self._steps_s: deque[float] = deque(maxlen=LAST)
        self._saves_s: deque[float] = deque(maxlen=LAST)
        self._since = self._saved = self._asked_at = clock()
        self.exit_code: int | None = None
        self.saves = 0
        self.stepping = False

    @property
    def step_s(self) -> float:
        """How long a step takes, in seconds; 0 before the first one."""
        return max(self._steps_s, default=0.0)

    @property
    def save_s(self) -> float:
        """How long a checkpoint takes, in seconds; 0 before the first one."""
        return max(self._saves_s, default=0.0)

    @property
    def every_s(self) -> float:
        """Most seconds between two checkpoints: `save_minutes`, or more where saving is slow."""
        return max(60.0 * self._options.save_minutes, WORTH * self.save_s)

    def numbers(self) -> dict[str, float]:
        """What was measured, for the manifest."""
        return {"saves": self.saves, "save_s": round(self.save_s, 3), "step_s": round(self.step_s, 3)}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first step begins."""
        self._since = self._saved = self._clock()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Transformers has read the checkpoint, random states last."""
        self.stepping = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Decide, the same on every rank."""
        now = self._clock()
        self._steps_s.append(now - self._since)
        last = state.global_step >= state.max_steps
        limited = math.isfinite(self._deadline.left_s())
        # what follows: another step, or the final weights, which are no smaller work than a checkpoint
        next_s = self.save_s if last else self.step_s
        unsaved_s = now - self._saved
        worth_it = unsaved_s > max(REDONE_S, 2 * self.save_s)
        asked, out_of_time, due = self._any_rank(
            self._leaving.asked,
            limited and self._deadline.left_s() < next_s + self.save_s,
            worth_it if last else unsaved_s >= self.every_s or (limited and not self._saves_s),
        )
        if asked or out_of_time:
            self.exit_code = EXIT_TERMINATED if asked else EXIT_OUT_OF_TIME
            control.should_training_stop = True
            why = "told to leave" if asked else self._why(next_s, last)
            log.info("%s; saving at step %d", why, state.global_step)
        if asked or out_of_time or due or (not last and state.global_step % self._options.save_steps == 0):
            control.should_save = self._has_room(needed=not last or self.exit_code is not None)
        self._since = self._asked_at = self._clock()
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint was made and is whole."""
        now, before_s = self._clock(), self.every_s
        self._saves_s.append(now - self._asked_at)
        self._since = self._saved = now
        self.saves += 1
        if self.every_s > before_s:
            log.warning(
                "a checkpoint takes %.0f s, so one follows every %.0f minutes and not every %g (save_minutes)",
                self.save_s, self.every_s / 60, self._options.save_minutes,
            )  # fmt: skip
        if self.saves == 1:
            self._tell_budget()

    def _tell_budget(self) -> None:
        needed_s, grace_s = self.step_s + self.save_s, self._leaving.grace_s
        log.info(
            "a step takes up to %.1f s, a checkpoint %.1f s: one every %d steps or %.1f minutes",
            self.step_s, self.save_s, self._options.save_steps, self.every_s / 60,
        )  # fmt: skip
        if needed_s > 0.9 * grace_s:
            log.warning(
                "a job that is preempted has %.0f s, and a step with its checkpoint takes %.0f s: what was done since "
                "the last one would be lost. Raise stages.%s.signal_delay_s to %.0f or more",
                grace_s, needed_s, self._stage, 1.25 * needed_s + 10,
            )  # fmt: skip

    def _why(self, next_s: float, last: bool) -> str:
        left_s = max(0.0, self._deadline.left_s())
        what = "the final weights" if last else f"another step of {next_s:.0f} s"
        return f"{what} and a checkpoint do not fit into the {left_s:.0f} s that are left"

    def _has_room(self, needed: bool) -> bool:
        """Whether a checkpoint fits. A training that is done goes on to its final weights without one."""
        try:
            self._check_room()
        except CheckpointFailed as error:
            if needed:
                raise
            log.warning("%s; the final weights are written without it", error)
            return False
        return True

    def _any_rank(self, *said: bool) -> list[bool]:
        """Each, whether any rank says it."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return list(said)
        flags = torch.tensor(said, dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]
