"""How much memory an engine takes: what the config says, and less after it has run out (V5).

Each time that a stage runs out of memory is a *notch*: 0.1 less of each GPU, half as many sequences at once, half the
KV cache on CPUs, within limits. How many there were follows from the end records of the stage's jobs, in this round and
those before it; a person who changes the config or resumes a stopped run starts at none again. Nothing here imports
torch: the login node asks too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from hpc_rl.cluster.entry import MEMORY, EndRecord
from hpc_rl.config.phases import SampleConfig
from hpc_rl.run import atomic
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.workspace import Workspace

log = logging.getLogger(__name__)

UTILIZATION_STEP = 0.1
LEAST_SEQUENCES = 16
USUAL_SEQUENCES = {"vllm": 256, "transformers": 32}
"""Sequences at once where the config says null. vLLM has 1024 on GPUs of 70 GiB and more (vllm/engine/arg_utils.py)."""
CPU_NOTCHES = 4
"""Halvings of a KV cache on CPUs before the run stops."""


class End(Protocol):
    """What of an end record counts here."""

    @property
    def name(self) -> str:
        """The submission."""

    @property
    def started(self) -> float:
        """When the body started, seconds since the epoch."""

    @property
    def ended(self) -> float:
        """When it ended."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that an engine takes.

    Attributes
    ----------
    notches
        How often it ran out before.
    gpu_memory_utilization
        Share of each GPU's memory.
    max_num_seqs
        Sequences at once; None = the engine's own choice.
    cpu_kv_cache_gib
        Of the KV cache where there is no GPU.
    """

    notches: int
    gpu_memory_utilization: float
    max_num_seqs: int | None
    cpu_kv_cache_gib: float


def plan(
    sample: SampleConfig, notches: int, engine: str = "vllm", *, memory_gib: float, least_kv_gib: float = 0.0
) -> MemoryPlan:
    """What to take after running out of memory `notches` times.

    Parameters
    ----------
    engine
        `vllm` or `transformers`.
    memory_gib
        What this machine has; a KV cache that is larger than that is halved from there.
    least_kv_gib
        What one request of the longest kind needs in the KV cache: it gets no smaller than that.
    """
    asked = sample.max_num_seqs
    if notches == 0:
        return MemoryPlan(0, sample.gpu_memory_utilization, asked, sample.cpu_kv_cache_gib)
    usual = asked or USUAL_SEQUENCES[engine]
    lowered_share = round(sample.gpu_memory_utilization - UTILIZATION_STEP * notches, 4)
    lowered_cache = min(sample.cpu_kv_cache_gib, memory_gib) / 2**notches
    return MemoryPlan(
        notches,
        max(lowered_share, sample.least_gpu_memory_utilization),
        max(usual >> notches, min(usual, LEAST_SEQUENCES)),
        min(sample.cpu_kv_cache_gib, max(lowered_cache, least_kv_gib)),
    )


def most_notches(sample: SampleConfig, engine: str, has_gpus: bool) -> int:
    """After how many notches nothing gets lower any more; 0 where nothing can.

    Parameters
    ----------
    engine
        As in the config. For `auto` it is vLLM's number: which engine it is, only the job knows.
    """
    sequences = sample.max_num_seqs or USUAL_SEQUENCES["transformers" if engine == "transformers" else "vllm"]
    halvings = next(n for n in count() if sequences >> n <= LEAST_SEQUENCES)
    if engine == "transformers":  # which has none of the rest
        return halvings
    shares = (sample.gpu_memory_utilization - sample.least_gpu_memory_utilization) / UTILIZATION_STEP
    return max(halvings, ceil(round(shares, 6)) if has_gpus else CPU_NOTCHES)


def count_notches(ends: Iterable[End]) -> int:
    """Notches that ends out of memory amount to.

    Tasks of one array that fail together had the same settings: they are one notch. A task that started after another
    of its array had failed had lower ones already, and its failure is a notch of its own.
    """
    notches, since = 0, 0.0
    seen: set[str] = set()
    for end in sorted(ends, key=lambda end: end.ended):
        if end.name not in seen or end.started >= since:
            notches, since = notches + 1, end.ended
            seen.add(end.name)
    return notches


def notches_of(ws: Workspace, round: int, stage: str) -> int:
    """How often a stage ran out of memory up to now, in this round and those before, since its config was written.

    One folder listing a round, and no file is opened unless memory ran out.
    """
    since = max(ws.config_path.stat().st_mtime, Ledger(ws).history().resumed_at)
    ends = [end for number in range(round + 1) for end in _memory_ends(ws, number, stage)]
    return count_notches(end for end in ends if end.ended >= since)


def _memory_ends(ws: Workspace, round: int, stage: str) -> list[EndRecord]:
    folder = ws.attempts_dir(round, stage)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [name for name in names if name.endswith(f"{MEMORY}.json") and not name.startswith(".")]
    return [EndRecord(**atomic.read_json(folder / name)) for name in found]


def tell(plan: MemoryPlan, sample: SampleConfig, lowered: Iterable[str]) -> None:
    """Say aloud which fields of the config were lowered, with the old and the new numbers (V5)."""
    if plan.notches:
        changes = (f"{name} {getattr(plan, name)} instead of {getattr(sample, name) or 'null'}" for name in lowered)
        times = "once" if plan.notches == 1 else f"{plan.notches} times"
        log.warning("after running out of memory %s: %s", times, ", ".join(changes))


def memory_gib() -> float:
    """Memory that is available on this machine, in GiB (proc(5), meminfo), or the job's limit where that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_limits()]) / 2**30


def _cgroup_limits() -> Iterable[int]:
    """Bytes that our control groups may use (cgroups(7), version 2); none where they have no limit."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), "")
    group = Path("/sys/fs/cgroup", own)
    for folder in (group, *group.parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
        except OSError:
            continue
        if limit != "max":
            yield int(limit)


def kv_gib_of_longest(folder: str, dtype: str, max_model_len: int | None, block_tokens: int = 128) -> float:
    """KV cache of one request of the longest kind, in GiB: keys and values of each layer, in whole blocks and one more.

    For models whose layers all attend in full; others need less.
    """
    from transformers import AutoConfig

    text: Any = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    tokens = max_model_len or text.max_position_embeddings
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    blocks = ceil(tokens / block_tokens) + 1
    per_token: int = 2 * text.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)
    return float(blocks * block_tokens * per_token / 2**30)
