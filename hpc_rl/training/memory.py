"""How a training goes on that ran out of memory: smaller forward passes, more of them, and the same optimizer step.

Each time that it runs out is a notch (counted as for engines, `hpc_rl.engines.memory`): half as many units in a forward
pass, twice as many passes. So the gradient is the same sum, its checkpoints go on, and only the time of a step differs.
Two losses are means over the tokens of a forward pass by their definition, and differ with its size: GRPO's bnpo, and
DPO's `nll_weight`.
Without torch, since recipes ask on the login node.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import TypeVar

from hpc_rl.config.training import TrainConfig
from hpc_rl.training.task import TrainTask

log = logging.getLogger(__name__)

S = TypeVar("S", bound=TrainConfig)


def most_notches(settings: TrainConfig) -> int:
    """After how many notches one unit is left in a forward pass."""
    return len(_factors(settings.per_device_batch_size))


def way_out(section: str) -> str:
    """What a person may do where that is still too much, given the section's name."""
    return (
        f"There is one unit in a forward pass already. Lower {section}.max_length (or what the data allows), set "
        f"{section}.gradient_checkpointing: true, or {section}.deepspeed: configs/deepspeed/zero3_offload.json; or "
        "give it more memory or more GPUs"
    )


def lowered(settings: S, notches: int) -> S:
    """The settings after so many notches. Units of a rank in an optimizer step stay the same.

    A batch whose size is odd is divided by its smallest factor: 6 becomes 3, then 1.
    """
    divisors = [1, *accumulate(_factors(settings.per_device_batch_size), mul)]
    divisor = divisors[min(notches, len(divisors) - 1)]
    return settings.model_copy(
        update={
            "per_device_batch_size": settings.per_device_batch_size // divisor,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps * divisor,
        }
    )


def lowered_task(task: TrainTask, notches: int) -> TrainTask:
    """The task after so many notches, said aloud."""
    settings = lowered(task.settings, notches)
    if notches:
        log.warning(
            "after running out of memory %s: %s.per_device_batch_size %d instead of %d, gradient_accumulation_steps %d "
            "instead of %d; an optimizer step is the same",
            "once" if notches == 1 else f"{notches} times", task.section, settings.per_device_batch_size,
            task.settings.per_device_batch_size, settings.gradient_accumulation_steps,
            task.settings.gradient_accumulation_steps,
        )  # fmt: skip
    return replace(task, settings=settings)


def _factors(number: int) -> list[int]:
    """Prime factors, the smallest first."""
    found, factor = [], 2
    while number > 1:
        while number % factor:
            factor += 1
        found.append(factor)
        number //= factor
    return found
