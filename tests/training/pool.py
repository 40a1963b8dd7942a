"""Ranks that train one stage after the other, and note what with: to start them anew for each takes long.

Run as `python -m tests.training.pool --workspace FOLDER --round 1`, once per rank: all trainings of the workspaces
`FOLDER/MODE`, one for each of `MODES` and `lora`; rank 0 notes them in `FOLDER/notes.json`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_rl import config as configs
from hpc_rl.orchestrate.job import parse_arguments
from hpc_rl.orchestrate.start import open_run
from tests.training.algorithms_recipe import FILES

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "tests/training/algorithms.yaml"
MODES = {
    "plain": ("DistributedDataParallel", 0), "zero2": ("DeepSpeedEngine", 2), "zero3": ("DeepSpeedEngine", 3)
}  # fmt: skip
"""Ways to train on several ranks: what wraps the model, and DeepSpeed's stage."""
LORA = (
    "model.lora.r=4", "model.lora.alpha=16", "model.lora.dropout=0.0",
    r"model.lora.target_modules=.*\.(q|k|v|o|gate|up|down)_proj",
    "grpo.beta=0.2", "grpo.reference=live", "grpo.passes=2", "dpo.reference=live",
    "joint.reward_model.export=merged",
)  # fmt: skip
"""Of one more run, with ZeRO-2: adapters, a divergence from a model in memory, steps that use their samples again."""
WITH_LORA = ("dpo", "grpo", "joint")
"""What that one trains."""
PLAIN = tuple(name for name in FILES if name not in ("weighted_sft", "rloo"))
"""What is trained without DeepSpeed too; the others are sft and grpo with another loss."""
Notes = dict[str, dict[str, Any]]
"""By algorithm: `losses` and `grad_norms` of the steps; `validation`, what the manifest says of it; `engine`, what
wrapped the model, and its `zero_stage`."""


def trained_in(mode: str) -> tuple[str, ...]:
    """The algorithms of one of `MODES`."""
    return PLAIN if mode == "plain" else tuple(FILES)


def open_run_of_one(folder: Path, *settings: str) -> Path:
    """A workspace in `folder` whose trainings have one rank, its data made; the model is beside it."""
    from tests.training import algorithms_body
    from tools import tiny_chat_model

    tiny_chat_model.write(folder / "model")
    root = _open(folder, "one", settings)
    assert algorithms_body.main(["--workspace", str(root), "--round", "1"]) == 0
    return root


def open_run_of_one_with_lora(folder: Path) -> Path:
    """The same with adapters, with the other's model and data."""
    return _open(folder, "one_lora", LORA)


def open_run_of_two(folder: Path, mode: str) -> Path:
    """The same for two ranks, with the other's model and data."""
    settings = list(LORA) if mode == "lora" else []
    for name in FILES:
        settings += [f"stages.train_{name}.nodes=2", f"{name}.per_device_batch_size=2"]
        if mode != "plain":
            settings.append(f"{name}.deepspeed=configs/deepspeed/{'zero2' if mode == 'lora' else mode}.json")
    return _open(folder, mode, settings)


def _open(folder: Path, name: str, settings: Sequence[str]) -> Path:
    root = folder / name
    config = configs.load(CONFIG, [f"model.path={folder / 'model'}", *settings], {}, root, cwd=REPOSITORY)
    open_run(config, CONFIG)
    return root


def train_all(workspace: Path, only: Sequence[str] = tuple(FILES)) -> Notes:
    """Do every training of a workspace as this rank of its job; what was trained with which losses."""
    from jobs import train

    notes: Notes = {}
    for algorithm in only:
        fresh()
        with _noted(notes, algorithm):
            assert train.main(["--workspace", str(workspace), "--round", "1", "--stage", f"train_{algorithm}"]) == 0
    fresh()
    return notes


def fresh() -> None:
    """Forget the last training: accelerate and DeepSpeed keep what they were told for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # with ACCELERATE_USE_DEEPSPEED the next training would use it unasked
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    if "deepspeed" in sys.modules:
        import deepspeed

        deepspeed.comm.comm.cdb = None  # its views of the process group that is gone
        importlib.reload(deepspeed.utils.groups)


@contextmanager
def _noted(notes: Notes, algorithm: str) -> Iterator[None]:
    from hpc_rl.training.run import TrainRun

    train = TrainRun.train

    def noting(self: TrainRun, trainer: Any, *others: Any, **more: Any) -> Any:
        trained = train(self, trainer, *others, **more)
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        engine = trainer.model_wrapped
        notes[algorithm] = {
            "losses": [entry["loss"] for entry in steps],
            "grad_norms": [entry["grad_norm"] for entry in steps],
            "validation": {k: v for k, v in trained.metrics.items() if k.startswith("validation_")} if trained else {},
            "engine": type(engine).__name__,
            "zero_stage": getattr(engine, "zero_optimization_stage", lambda: 0)(),
        }
        return trained

    TrainRun.train = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainRun.train = train  # type: ignore[method-assign]


def main(folder: Path) -> None:
    """Train all; rank 0 notes how, by mode."""
    import torch

    torch.set_num_threads(1)
    notes = {mode: train_all(folder / mode, trained_in(mode)) for mode in MODES}
    notes["lora"] = train_all(folder / "lora", WITH_LORA)
    if os.environ["RANK"] == "0":
        (folder / "notes.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(parse_arguments("train", sys.argv[1:]).workspace)
