"""How much memory an engine takes: what the config says, and less after it has run out (V5).

Each time that a stage runs out of memory is a *notch*: 0.1 less of each GPU, half as many sequences at once, half the
KV cache on CPUs, within limits. How many there were follows from the end records of the stage's jobs in this round; a
round begins with as many as engines of the rounds before it worked with, which those noted (`note_notches`). A person
who changes the config or resumes a stopped run starts at none again. Nothing here imports torch: the login node asks
too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from hpc_rl.cluster.entry import MEMORY, STARTED, EndRecord
from hpc_rl.config.phases import SamplingConfig
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
WAY_OUT = "Lower sample.max_model_len or sample.min_gpu_memory_utilization, or give it more memory or more GPUs"
"""What else a person may do about an engine; other stages have a way out of their own (`Stage.way_out`)."""
TAKEN = ".taken-"
"""In the name of the note of an engine that works with less memory."""


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
class Taken:
    """An engine worked after so many notches, from `ended` on (seconds since the epoch)."""

    notches: int
    ended: float


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
    sample: SamplingConfig, notches: int, engine: str = "vllm", *, memory_gib: float, least_kv_gib: float = 0.0
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


def most_notches(sample: SamplingConfig, engine: str, has_gpus: bool) -> int:
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


def count_notches(ends: Iterable[End], taken: Iterable[Taken] = (), begun: int = 0) -> int:
    """Notches that ends out of memory amount to.

    Tasks of one array that fail together had the same settings: they are one notch. A task that started after another
    of its array had failed had lower ones already, and its failure is a notch of its own.

    Parameters
    ----------
    taken
        What engines worked with: workers of a pool take less without an end of their task.
    begun
        Notches that were there before.
    """
    notches, since = begun, 0.0
    seen: set[str] = set()
    events: list[End | Taken] = [*ends, *taken]
    for event in sorted(events, key=lambda event: event.ended):
        if isinstance(event, Taken):
            notches = max(notches, event.notches)
        elif event.name not in seen or event.started >= since:
            notches, since = notches + 1, event.ended
            seen.add(event.name)
    return notches


def notches_of(ws: Workspace, round: int, stage: str, environ: Mapping[str, str] = os.environ) -> int:
    """After how many notches a stage's next engine opens, since its config was written.

    Of rounds before this one only those count with which engines worked: where one node was short of memory, and the
    others did its work as they were, the next round begins as they did. Of the own array those that were there when
    this task started, however long it took to come to its engine: else its failure would not be counted as another
    (`count_notches`).

    One folder listing a round, and no file is opened unless memory ran out.
    """
    own, started = environ.get("HPC_RL_ATTEMPT"), float(environ.get(STARTED, "inf"))
    since = max(ws.config_path.stat().st_mtime, Ledger(ws).history().resumed_at)
    begun, ends, taken = 0, [], []
    for number in range(round + 1):
        folder = ws.attempts_dir(number, stage)
        records = [(name, atomic.read_json(folder / name)) for name in _memory_records(folder)]
        records = [(name, record) for name, record in records if record["ended"] >= since]
        taken = [Taken(record["notches"], record["ended"]) for name, record in records if TAKEN in name]
        begun = max([begun, *(one.notches for one in taken if number < round)])
        ends = [EndRecord(**record) for name, record in records if TAKEN not in name]
        ends = [end for end in ends if end.name != own or end.ended <= started]
    return count_notches(ends, taken, begun)


def note_notches(ws: Workspace, round: int, stage: str, engine: Mapping[str, Any]) -> None:
    """Note with how many notches an open engine works, by its description: the next rounds begin with them.

    Of a pool's workers it is that with the most. One small file an attempt, and none where memory never ran out.
    """
    workers = [worker for worker in engine.get("workers", ()) if "given_up" not in worker]
    notches = max([int(one.get("notches", 0)) for one in (engine, *workers)])
    if not notches:
        return
    attempt = os.environ.get("HPC_RL_ATTEMPT", "by-hand")
    path = ws.attempts_dir(round, stage) / f"{attempt}{TAKEN}{notches:02d}{MEMORY}.json"
    try:
        atomic.create_exclusive(path, atomic.to_json({"notches": notches, "ended": time.time()}))
    except OSError as error:  # the work goes on
        log.warning("%s cannot be written (%s): later engines may run out of memory again", path, error)


def _memory_records(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [name for name in names if name.endswith(f"{MEMORY}.json") and not name.startswith(".")]


def tell(plan: MemoryPlan, sample: SamplingConfig, lowered: Iterable[str]) -> None:
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
