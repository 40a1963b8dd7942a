"""Rebuild models/tiny-lewis/{listener,speaker}: `python -m tools.build_tiny_models`.

Both start from one captioning model. The listener learns to answer yes or no to descriptions. The speaker learns the
output format together with a planted, systematic flaw (it mostly names the wrong pattern), which the game then has to
train away. Neither ever sees a held-out concept of the config's split. The command fails, and writes nothing, unless on
games of held-out concepts the listener finds at least 93 % of the targets by true descriptions, and by the untrained
speaker's about as many as by chance (20 to 42 %, chance is 33 %).
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from hpc_rl import config as configs
from hpc_rl.config.lewis import LewisConfig
from tools import tiny_model
from tools.tiny_exam import examine
from tools.tiny_lessons import Captions, Questions, album, corpus, training_scenes

SEED = 11  # of weights, lessons and their pictures; the game's pictures come from data.split_seed
VIEWS, BATCH = 80, 64
LISTENER_FLOOR = 0.93
SPEAKER_RANGE = (0.2, 0.42)


def fit(model: Any, lesson: Callable[[int], dict[str, Any]], *, steps: int, learning_rate: float, name: str) -> None:
    """AdamW on the weighted cross-entropy per row, warm-up 30 steps, then linearly down to 5 %."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.05, 1 - step / steps)
    )
    started, total, right = time.monotonic(), 0.0, 0.0
    model.train()
    for step in range(steps):
        batch = lesson(step)
        labels, weights = batch.pop("labels")[:, 1:], batch.pop("weights")[:, 1:]
        first = int((weights > 0).any(0).float().argmax())  # logits before the first taught token are not needed
        labels, weights = labels[:, first:], weights[:, first:]
        logits = model(**batch, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        loss = (loss * weights).sum() / len(labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        right += (logits[:, -2].argmax(-1) == labels[:, -2]).float().mean().item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(
                f"{name} {step + 1}: loss {total / 100:.4f}, last token {right / 100:.3f}, {seconds:.0f} s", flush=True
            )
            total = right = 0.0
    model.eval()


def teach(config: LewisConfig, caption_steps: int, question_steps: int, speaker_steps: int) -> tuple[Any, Any, Any]:
    """Train listener and speaker; returns them and their processor."""
    data = config.data
    subjects = training_scenes(data.k, data.validation_fraction, data.split_seed)
    base, processor = tiny_model.build(corpus(), seed=SEED)
    pictures = album(processor, subjects, views=VIEWS, seed=SEED)
    count = sum(parameter.numel() for parameter in base.parameters())
    print(f"{count} parameters, {len(processor.tokenizer)} tokens, {len(subjects)} training concepts", flush=True)
    captions = Captions(processor, pictures, seed=SEED, batch=BATCH, tags=False)
    fit(base, captions, steps=caption_steps, learning_rate=2e-3, name="captions")

    speaker = copy.deepcopy(base)
    flawed = Captions(processor, pictures, seed=SEED + 1, batch=BATCH, tags=True, flaw=0.65, slips=0.12)
    fit(speaker, flawed, steps=speaker_steps, learning_rate=1e-3, name="speaker")

    listener = base
    questions = Questions(processor, pictures, seed=SEED + 2, batch=BATCH, steps=question_steps)
    # At 1.5e-3 and more it stays with the first thing it learns, the colours, and never comes to the patterns.
    fit(listener, questions, steps=question_steps, learning_rate=6e-4, name="listener")
    return listener, speaker, processor


def main(argv: Sequence[str] | None = None) -> int:
    """Build, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny/lewis.yaml", help="whose data section counts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("models/tiny-lewis"), help="folder to write (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--caption-steps", type=int, default=600, help="both models (%(default)s)")
    parser.add_argument("--question-steps", type=int, default=1600, help="the listener (%(default)s)")
    parser.add_argument("--speaker-steps", type=int, default=200, help="the speaker (%(default)s)")
    options = parser.parse_args(argv)
    config = configs.load(options.config, env={})
    assert isinstance(config, LewisConfig)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.monotonic()
    listener, speaker, processor = teach(config, options.caption_steps, options.question_steps, options.speaker_steps)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        made = {"listener": scratch / "listener", "speaker": scratch / "speaker"}
        tiny_model.save(listener, processor, made["listener"])
        tiny_model.save(speaker, processor, made["speaker"])
        result = examine(config, made["listener"], made["speaker"], scratch / "images", games=504)
        print(f"{result}\n{time.monotonic() - started:.0f} s in all")
        if result.by_truth < LISTENER_FLOOR or not SPEAKER_RANGE[0] <= result.by_speaker <= SPEAKER_RANGE[1]:
            print(
                f"not written: by_truth must be at least {LISTENER_FLOOR}, by_speaker within {SPEAKER_RANGE}",
                file=sys.stderr,
            )
            return 1
        for role, folder in made.items():
            shutil.copytree(folder, options.out / role, dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
