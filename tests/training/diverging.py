"""Two ranks, one of which has numbers that end: plain, then ZeRO-2. Run by test_diverged.py; not a test module."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hpc_rl.orchestrate.job import parse_arguments
from hpc_rl.training.checkpointing.checkpoints import Checkpoints
from hpc_rl.training.errors import Diverged
from hpc_rl.training.ranks.distributed import World, process_group
from tests.training import small
from tests.waiting import PATIENCE_S

ZERO2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": False}, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip


def diverge(folder: Path, world: World, batches: small.Batches, **more: Any) -> None:
    """Train until it stops, and print what it said and left."""
    own = Checkpoints(folder, "a", "same work")
    if world.is_main:
        own.create()
    made = small.trainer(own, batches, rank=world.rank, **more)
    try:
        made.train()
    except Diverged as error:
        found = own.latest()
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in small.weights(made).values())
        left = {"said": str(error), "checkpoint": found and found.step, "finite": finite}
        print(json.dumps({**left, "engine": type(made.model_wrapped).__name__}), flush=True)


def main(folder: Path) -> None:
    """Both, in one pair of processes: starting them takes the longest."""
    with process_group(folder, deepspeed=True, preflight_s=PATIENCE_S) as world:
        diverge(folder / "plain", world, small.Batches(world.rank, bad=["unit-1-5-2"]))
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        model, passes = small.Words(), 0

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            return gradient * (float("nan") if passes == 5 and world.rank == 1 else 1.0)

        model.layer.weight.register_hook(spoil)
        diverge(folder / "zero2", world, small.Batches(world.rank), model=model, deepspeed=ZERO2)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(parse_arguments("train", None).workspace)
