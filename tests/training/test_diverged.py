"""A training whose numbers end stops before they are written anywhere, and says where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hpc_rl.run.workspace import Workspace
from hpc_rl.training.errors import Diverged
from tests.training import small
from tests.training.conftest import start_ranks


def test_a_loss_that_is_no_number_ends_it_before_the_step_and_names_the_units(tmp_path: Path) -> None:
    """The first pass of step 4 is the one: nothing was changed since step 3, and the checkpoint of step 2 stays."""
    own = small.opened(tmp_path)
    made = small.trainer(own, small.Batches(bad=["unit-0-6-1"]))
    with pytest.raises(Diverged) as stopped:
        made.train()
    said = "the loss of step 4 is not finite on rank 0, forward pass 0: unit-0-6-0, unit-0-6-1, unit-0-6-2"
    assert str(stopped.value) == said
    assert made.state.global_step == 3
    assert all(torch.isfinite(tensor).all() for tensor in small.weights(made).values())
    found = own.latest()
    assert found is not None and found.step == 2 and [path.name for path in own.own.iterdir()] == ["checkpoint-2"]


def test_gradients_that_are_no_numbers_end_it_though_the_loss_is_one(tmp_path: Path) -> None:
    own = small.opened(tmp_path)
    model = small.Words()
    passes = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return gradient * (math.inf if passes == 5 else 1.0)

    model.layer.weight.register_hook(spoil)
    made = small.trainer(own, model=model)
    with pytest.raises(Diverged, match=r"gradients of step 3 are not finite, .* last batch has unit-0-5-0, unit-0-5-1"):
        made.train()
    assert all(torch.isfinite(tensor).all() for tensor in small.weights(made).values())
    found = own.latest()
    assert found is not None and found.step == 2


def test_on_one_rank_it_ends_all_and_deepspeed_does_not_leave_the_step_out(tmp_path: Path) -> None:
    ranks = start_ranks(Workspace(tmp_path), 2, program=("tests.training.diverging",))
    assert ranks.wait() == [0, 0], ranks.said()
    told = [[json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")] for log in ranks.logs]
    for rank, (loss, gradients) in enumerate(told):
        assert loss["said"] == (
            "the loss of step 3 is not finite on rank 1, forward pass 1: unit-1-5-0, unit-1-5-1, unit-1-5-2"
        )
        assert gradients["engine"] == "DeepSpeedEngine"
        assert "the gradients of step 3 are not finite" in gradients["said"] and f"unit-{rank}-5-0" in gradients["said"]
        assert loss["checkpoint"] == gradients["checkpoint"] == 2 and loss["finite"] and gradients["finite"]
