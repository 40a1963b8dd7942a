"""Which engine a stage uses, opened with the run's settings: the one door to vLLM and to transformers."""

from __future__ import annotations

import atexit
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata

from hpc_rl.cluster.failures import has_no_room_for_cache
from hpc_rl.config.phases import SamplingConfig
from hpc_rl.engines import compile_cache as caches
from hpc_rl.engines import memory
from hpc_rl.engines.base import Engine
from hpc_rl.engines.described import OpenedEngine
from hpc_rl.engines.engine_spec import EngineSpec
from hpc_rl.engines.memory import MemoryPlan
from hpc_rl.engines.placing import Placed, place_weights
from hpc_rl.run.private import NotPrivate

log = logging.getLogger(__name__)

_UNSUPPORTED = re.compile(  # vllm/model_executor/models/registry.py
    r"Model architecture.*? (?:are not supported for now|is not supported anymore|is not supported in-tree anymore)"
    r"|The Transformers implementation of .*? is not compatible with vLLM",
    re.DOTALL,
)


_IN_ANOTHER_PROCESS = "Engine core initialization failed"
"""All that vLLM raises here when an engine on several GPUs does not start (vllm/v1/engine/utils.py)."""


class NoRoomForCache(ValueError):
    """The engine was given too little memory for the KV cache; the message says what to change."""


class EngineCoreFailed(RuntimeError):
    """vLLM's processes did not start; why, only the log says."""


def open_engine(spec: EngineSpec) -> OpenedEngine:
    """An engine in this process, with a role's weights in it.

    Raises
    ------
    ValueError
        For what the user can change: vLLM is not installed (`VllmMissing`), no room for the KV cache
        (`NoRoomForCache`), `stage_to` that cannot be used (`NoNodeFolder`, `NoRoom`), no model folder.
    """
    opening = _Opening(spec)
    atexit.register(opening.lent.close)  # a job that does not close its engine would hold its slot until that is stale
    try:
        return opening.open()
    except BaseException:
        opening.lent.close()
        raise


@dataclass
class _Opening:
    """One engine on its way."""

    spec: EngineSpec
    lent: ExitStack = field(default_factory=ExitStack)
    loading: dict[str, float] = field(default_factory=dict)
    description: dict[str, object] = field(default_factory=dict)

    @property
    def sample(self) -> SamplingConfig:
        return self.spec.sample

    def open(self) -> OpenedEngine:
        """The engine that is asked for."""
        asked, weights, model = self.spec.kind, self.spec.weights, self.spec.model
        with self._timed("import"):
            from hpc_rl.engines.vllm_start import VllmMissing, check_installed

        why = ""
        if asked == "auto":
            try:
                check_installed()
            except VllmMissing as error:
                why = str(error)
        elif asked == "vllm":
            check_installed()
        merges = asked == "transformers" or bool(why)
        placed = place_weights(
            weights.base,
            weights.adapter,
            self.sample,
            model.dtype,
            trained=weights.base != str(model.path),
            merges=merges,
            lent=self.lent,
        )
        self.loading |= placed.loading
        self.description |= placed.about
        if not merges:
            try:
                return self._opened(self._vllm(placed), "vllm")
            except ValueError as error:
                refused = _UNSUPPORTED.search(str(error))
                if asked != "auto" or refused is None:
                    raise
                why = f"vLLM: {refused[0]}"
        if why:
            log.warning("engine auto: sampling with transformers, which is slower. %s", why)
        return self._opened(self._transformers(placed), "transformers", why)

    def _opened(self, engine: Engine, kind: str, why: str = "") -> OpenedEngine:
        description = {"engine": kind, "asked": self.spec.kind, **({"why": why} if why else {}), **self.description}
        loading = {part: round(seconds, 2) for part, seconds in self.loading.items()}
        log.info("the engine is ready: %s; seconds: %s", description, loading)
        return OpenedEngine(engine, kind, description, loading, self.lent.close)

    def _vllm(self, placed: Placed) -> Engine:
        with self._timed("import"):
            import torch

            on_gpu = torch.cuda.is_available()
            from hpc_rl.engines.vllm_start import import_vllm

            slot = self._claim_slot()
            compile_cache = None if slot is None else slot.folder
            parallel = self.sample.tensor_parallel_size
            import_vllm(
                batch_invariant=self.sample.batch_invariant, tensor_parallel_size=parallel, compile_cache=compile_cache
            )
            from hpc_rl.engines.merging import lora_rank
            from hpc_rl.engines.vllm_engine import VllmEngine
        memory_field = "gpu_memory_utilization" if on_gpu else "cpu_kv_cache_gib"
        plan = self._plan("vllm", memory_field, "max_num_seqs")
        strategy = self.sample.load_strategy
        if strategy == "auto":
            strategy = "lazy" if placed.on_node else "prefetch"
        with self._timed("engine"), _said_what_to_do(plan, memory_field):
            engine = VllmEngine(
                placed.base if slot is None else slot.stable_path(placed.base),
                placed.adapter,
                adapter_name=f"adapter-{self.spec.weights.hash[:16]}",
                adapter_rank=0 if placed.adapter is None else lora_rank(placed.adapter),
                dtype=self.spec.model.dtype,
                min_pixels=self.spec.model.pixels[0],
                max_pixels=self.spec.model.pixels[1],
                variables=self.spec.model.chat_template_kwargs,
                max_model_len=self.sample.max_model_len,
                gpu_memory_utilization=plan.gpu_memory_utilization,
                batch_invariant=self.sample.batch_invariant,
                max_num_seqs=plan.max_num_seqs,
                tensor_parallel_size=parallel,
                load_strategy=strategy,
                compile_cache=compile_cache,
                cpu_kv_cache_gib=plan.cpu_kv_cache_gib,
            )
        if slot is not None:
            slot.settle()
        self.description |= {
            memory_field: getattr(plan, memory_field),
            "max_num_seqs": engine.capacity,
            "tensor_parallel_size": parallel or max(1, torch.cuda.device_count()),
            "batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT") == "1",
            "load_strategy": strategy,
            "compile_cache": None if slot is None else str(slot.folder),
            "version": metadata.version("vllm"),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }
        return engine

    def _transformers(self, placed: Placed) -> Engine:
        plan = self._plan("transformers", "max_num_seqs")
        with self._timed("import"):
            import torch

            from hpc_rl.engines.transformers_engine import TransformersEngine
        with self._timed("engine"):
            engine = TransformersEngine(
                placed.base,
                placed.adapter,
                merge=self.sample.merge_adapter,
                dtype=self.spec.model.dtype,
                attention=self.spec.model.attn_implementation,
                min_pixels=self.spec.model.pixels[0],
                max_pixels=self.spec.model.pixels[1],
                variables=self.spec.model.chat_template_kwargs,
                max_model_len=self.sample.max_model_len,
                max_num_seqs=plan.max_num_seqs,
            )
        self.description |= {
            "max_num_seqs": engine.capacity,
            "version": metadata.version("transformers"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        return engine

    def _claim_slot(self) -> caches.Slot | None:
        """Where what vLLM compiles is kept; None where it is not."""
        if self.spec.cache_dir is None or not self.sample.keep_compiled:
            return None
        number = caches.own_number(self.sample.data_parallel_size)
        try:
            slot = caches.claim(self.spec.cache_dir, caches.what_compiles(), number)
        except NotPrivate as error:
            raise NotPrivate(f"{error}, or set sample.keep_compiled to false") from error
        if slot is not None:
            self.lent.callback(slot.close)
        return slot

    def _plan(self, engine: str, *lowered: str) -> MemoryPlan:
        """The memory to take; what differs from the config is said aloud."""
        least = 0.0
        if self.spec.notches and "cpu_kv_cache_gib" in lowered:
            least = memory.kv_gib_of_longest(self.spec.weights.base, self.spec.model.dtype, self.sample.max_model_len)
        plan = memory.plan(self.sample, self.spec.notches, engine, memory_gib=memory.memory_gib(), least_kv_gib=least)
        memory.tell(plan, self.sample, lowered)
        self.description["notches"] = plan.notches
        return plan

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.loading[part] = self.loading.get(part, 0.0) + time.monotonic() - started


@contextmanager
def _said_what_to_do(plan: MemoryPlan, memory_field: str) -> Iterator[None]:
    """Too little memory for the KV cache, in the words of the config. Less would not help, so it is no notch.

    An engine on several GPUs is made of processes, and what is raised there comes to the log alone.
    """
    way_out = (
        f"raise sample.{memory_field}, lower sample.max_model_len, or give the engine more GPUs (tensor_parallel_size)"
    )
    try:
        yield
    except Exception as error:
        if _IN_ANOTHER_PROCESS in str(error):
            raise EngineCoreFailed(
                f"the engine's processes did not start; why is in the log above (lines with EngineCore or Worker). "
                f"Where the KV cache has no room with {memory_field} {getattr(plan, memory_field):g}: {way_out}. "
                f"vLLM says: {error}"
            ) from error
        if not has_no_room_for_cache(str(error)):
            raise
        lowered = f", lowered {plan.notches} times after running out of memory" if plan.notches else ""
        raise NoRoomForCache(
            f"the KV cache has no room with {memory_field} {getattr(plan, memory_field):g}{lowered}: "
            f"{way_out}. vLLM says: {error}"
        ) from error
