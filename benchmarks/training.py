"""What the training job loses against a bare TRL script: seconds per optimizer step of both, in turns.

    python -m benchmarks.training [--cases sft dpo grpo] [--repeat 5] [--threads 1] [--quick]
    python -m benchmarks.training --model 135m --dtype bfloat16      on a GPU: steps, tokens per second, memory

    bare   a script with TRL's trainer (benchmarks/training_sides.py): its own loader and collator, its own settings
           from the same numbers; nothing is saved or reported. GRPO does not generate: it is given the stored samples.
    job    `python -m jobs.train` in a workspace made by `hpc_rl.launch --init`, as users run it, with all that it
           does within a step: batches from the plan, checks for numbers that are none, TensorBoard, texts, tokens per
           second. It saves nothing between its steps.

Both train all weights of the same model on the same rows, which have one length so that all batches are alike, in
processes of their own with the same environment, one after the other in turns. A step's seconds are those between two
logged ones; so nothing before the second step counts: start-up, and the reference pass of DPO, on both sides.

Prints seconds per step of both sides, turn by turn, the medians of all steps and their ratio, tokens per second and on
a GPU memory. Ends with status 1 when a ratio is above the target.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.training_recipe import FILES, TrainingConfig
from hpc_rl.orchestrate.job import load
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = 1.05
SETTINGS = {
    "tiny": [],
    "135m": [
        "data.prompt_tokens=256", "data.completion_tokens=256",
        *(f"{name}.per_device_batch_size={size}" for name, size in (("sft", 16), ("dpo", 8), ("grpo", 16))),
    ],
}  # fmt: skip
"""Of the data, by model."""


@dataclass(frozen=True)
class Turn:
    """One side, once: seconds of its steps but the first, and the most GPU memory, 0 without a GPU."""

    step_s: Sequence[float]
    peak_gpu_gib: float


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the target is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--repeat", type=int, default=5, help="turns that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a turn (default: %(default)s)")
    parser.add_argument("--model", choices=list(SETTINGS), default="tiny", help="its size (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="one turn: a look, no result")
    options = parser.parse_args(argv)
    os.environ |= {
        "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpc_rl-bench-") as name:
        workspace = _prepare(Path(name), options)
        missed = [case for case in options.cases if not _measure(case, workspace, options)]
    print(f"above {TARGET}: {', '.join(missed)}" if missed else f"all meet the target {TARGET}")
    return 1 if missed else 0


def _prepare(folder: Path, options: argparse.Namespace) -> Path:
    """A workspace with the data of all cases."""
    write_model(folder / "model", options.model)
    settings = [*SETTINGS[options.model], f"model.path={folder / 'model'}", f"model.dtype={options.dtype}"]
    words = [word for setting in [*settings, f"data.steps={options.steps}"] for word in ("--set", setting)]
    _run(["hpc_rl.launch", "benchmarks/training.yaml", "--workspace", str(folder / "run"), "--init", *words])
    _run(["benchmarks.training_body", "--workspace", str(folder / "run"), "--round", "1"])
    return folder / "run"


def write_model(folder: Path, size: str) -> None:
    """A model with random weights; `135m` has the architecture of SmolLM2-135M, which decides what a step costs."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tools.tiny_chat_model import CORPUS
    from tools.tiny_model import build_tokenizer

    tokenizer = build_tokenizer(CORPUS)
    shapes: dict[str, dict[str, Any]] = {
        "tiny": {
            "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        "135m": {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0,
        },
    }  # fmt: skip
    config = LlamaConfig(
        **shapes[size], max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measure(case: str, workspace: Path, options: argparse.Namespace) -> bool:
    """Both sides of a case, in turns; whether it meets its target."""
    print(f"\n{case}, model {options.model} in {options.dtype}, {options.steps} steps", flush=True)
    bare, job = [], []
    for turn in range(1 if options.quick else options.repeat + 1):
        sides = (_job, _bare) if turn % 2 else (_bare, _job)
        done = {side: side(case, workspace) for side in sides}
        counts = turn > 0 or options.quick  # the first fills the page cache
        if counts:
            bare.append(done[_bare])
            job.append(done[_job])
        bare_s, job_s = (statistics.median(done[side].step_s) for side in (_bare, _job))
        note = "" if counts else "   (does not count)"
        print(f"  bare {bare_s:.4f}   job {job_s:.4f} s a step   {job_s / bare_s:.3f}{note}", flush=True)
    return _report(case, bare, job, _tokens(case, workspace))


def _report(case: str, bare: Sequence[Turn], job: Sequence[Turn], tokens: int) -> bool:
    seconds = [statistics.median(s for turn in side for s in turn.step_s) for side in (bare, job)]
    ratio = seconds[1] / seconds[0]
    print(
        f"median of {len(bare)} × {len(bare[0].step_s)} steps: bare {seconds[0]:.4f}, job {seconds[1]:.4f} s a step, "
        f"ratio {ratio:.3f} (wanted: at most {TARGET}); {tokens / seconds[0]:.0f}, {tokens / seconds[1]:.0f} tokens/s"
    )
    if bare[0].peak_gpu_gib:
        peaks = [max(turn.peak_gpu_gib for turn in side) for side in (bare, job)]
        print(f"most GPU memory: bare {peaks[0]:.2f}, job {peaks[1]:.2f} GiB")
    return ratio <= TARGET


def _tokens(case: str, workspace: Path) -> int:
    """Tokens that go through the model in a step."""
    config = load(workspace, 1, case).config
    assert isinstance(config, TrainingConfig)
    section, data = getattr(config, case), config.data
    rows = section.per_device_batch_size * section.gradient_accumulation_steps * (2 if case == "dpo" else 1)
    return int(rows * (data.prompt_tokens + data.completion_tokens))


def _bare(case: str, workspace: Path) -> Turn:
    found = json.loads(_run(["benchmarks.training_sides", str(workspace), case]).splitlines()[-1])
    return Turn(found["step_s"], found["peak_gpu_gib"])


def _job(case: str, workspace: Path) -> Turn:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = workspace.with_name("turn")
    shutil.copytree(workspace, root)
    _run(["jobs.train", "--workspace", str(root), "--round", "1", "--stage", case])
    ws = Workspace(root)
    events = EventAccumulator(str(ws.tb_dir / "round_01" / case))
    events.Reload()
    times = [point.wall_time for point in events.Scalars("train/loss")]
    metrics: Any = manifest.read(ws, 1, case, 0).metrics
    shutil.rmtree(root)
    seconds = [after - before for before, after in pairwise(times)]
    return Turn(seconds, metrics.get("peak_gpu_gib", 0.0))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
