"""Room for the run: free space against a rough estimate of what the rounds to come will write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from hpc_rl.config.check_storage import nearest_folder
from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.config.sampling_recipe import SamplingRecipeConfig
from hpc_rl.health.findings import Finding, Subject
from hpc_rl.health.paths import weights_bytes
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.units import size

AREA = "disk"
BYTES_PER_TOKEN = 2 * 12
"""Of a sampled token: id, log-probability and text, once sampled and once graded."""
CHECKPOINT = 2 * 7
"""A checkpoint of all of a model's weights, as a multiple of these in 16 bit: they, and in 32 bit a copy and Adam's two
moments. Twice, since the one before goes when the next one is whole."""
FEW_FILES = 10_000
GIB = 1 << 30


@dataclass(frozen=True)
class Need:
    """Bytes: kept of each round that is still to come, all of these rounds together, and only while one trains.

    `models` is what is certain of `per_round`; the rest is samples, of which most are shorter than they may be.
    """

    per_round: int
    kept: int
    passing: int
    models: int


def disk(subject: Subject) -> Iterator[Finding]:
    """Free bytes and files of the workspace's file system. A quota is not seen here."""
    folder = nearest_folder(subject.config.run.workspace)
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    need = estimate(subject)
    what = f"{size(free)} free at {folder}"
    if need.kept:
        what += (
            f"; the run still needs at most {size(need.kept + need.passing)} ({size(need.per_round)} a round is kept, "
            f"{size(need.passing)} comes and goes while a model trains)"
        )
    remedy = "make room, or choose another --workspace; a quota may be lower still"
    if free < max(GIB // 8, need.models + need.passing):
        yield Finding(AREA, "problem", what, remedy)
    elif free < need.kept + need.passing:
        yield Finding(AREA, "warning", what, remedy)
    else:
        yield Finding(AREA, "ok", what)
    if found.f_files > 0 and found.f_favail < FEW_FILES:
        yield Finding(AREA, "warning", f"only {found.f_favail} more files fit there", remedy)


def estimate(subject: Subject) -> Need:
    """What is left of the run will write, by the size of its models, and at most so many tokens as it may sample."""
    config, graph, ws = subject.config, subject.graph, Workspace(subject.config.run.workspace)
    open_rounds = {s.round for s in graph.work if len(manifest.done_shards(ws, s.round, s.name)) < s.shards} - {0}
    kept = passing = 0
    for name, field in config.trained_models.items():
        model = getattr(config, field, None)
        rounds = sum(stage.name == name and stage.round in open_rounds for stage in graph.work)
        if isinstance(model, TrainedModelConfig) and rounds:
            weights = weights_bytes(model.path)
            kept += rounds * (_adapter_bytes(model, weights) if model.lora else weights)
            passing = max(passing, CHECKPOINT * (_adapter_bytes(model, weights) if model.lora else weights))
    models = kept
    if isinstance(config, SamplingRecipeConfig):
        sample = config.sample
        prompts = sum(config.prompts_in(round, look=not subject.quick) or 0 for round in sorted(open_rounds))
        kept += prompts * sample.samples_per_prompt * sample.max_tokens * BYTES_PER_TOKEN
    rounds = max(1, len(open_rounds))
    return Need(kept // rounds, kept, passing, models // rounds)


def _adapter_bytes(model: TrainedModelConfig, weights: int) -> int:
    """An adapter is small beside its model; of a rank as high as the model is wide it would be as large."""
    return weights // 10
