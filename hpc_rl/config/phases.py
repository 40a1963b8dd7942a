"""How a round samples and evaluates: the numbers of the engines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hpc_rl.config.base import (
    Fault,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

Engine = Literal["vllm", "transformers", "auto"]

USUAL_LEAST_SHARE = 0.5
"""`min_gpu_memory_utilization` where it is null."""
_NODE_PATH = re.compile(r"(/|~/|\$\w+|\$\{\w+\})([^$]|\$\w+|\$\{\w+\})*")
"""What `hpc_rl.engines.node_disk` resolves to an absolute path. `${NAME:-default}` is the shell's, not the node's."""


class SamplingConfig(Section):
    """How an engine samples completions, G of each prompt; a recipe adds what it samples."""

    engine: Engine = "vllm"
    """What generates. auto: vllm; transformers where vLLM is not installed or does not know the model's architecture,
    and in no other case (V6). Log, manifests and report say which it was."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Completions (G) of each prompt: the group that the advantage is relative to (L15)."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must be 1: truncated sampling biases the importance ratio of training."""
    max_tokens: PositiveInt = 512
    """Longest completion, in tokens."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together, in tokens. null = the model's own limit."""
    long_prompts: Literal["error", "drop", "truncate_left"] = "error"
    """What becomes of a prompt that leaves less than `max_tokens` for its completion. error: stop before the engine
    starts, with its row. drop: leave it out, counted. truncate_left: cut tokens off its beginning; for texts only, so
    not in the Lewis game."""
    data_parallel_size: PositiveInt = 1
    """Engines of one sampling task, each a worker process with GPUs of its own (V1): with 8 GPUs a node,
    `stages.sample: {gpus_per_node: 8, ranks_per_node: 1}` and 8 here. They share the task's `cpus_per_task` and
    `mem_gb`: ask for as much more. Evaluation has one engine."""
    gpu_ids: tuple[NonNegativeInt, ...] | None = None
    """GPUs of a sampling task that its engines use, numbered from 0 as it sees them (V1). null = all that it has."""
    tensor_parallel_size: PositiveInt | None = None
    """GPUs of one engine, evaluation's too. null = the sampling task's GPUs / data_parallel_size; of evaluation, and of
    a speaker that is served, all GPUs."""
    worker_patience_s: Annotated[float, Field(ge=30, allow_inf_nan=False)] = 600.0
    """With several engines: one that has requests and does not move for so long hangs; it is killed and replaced. More
    than the longest step may take: a token, a long prompt, with vLLM a kernel that is compiled on its first use."""
    max_num_seqs: PositiveInt | None = None
    """Completions that one engine samples at once. null = vLLM's own choice (1024 on GPUs of 70 GiB and more, else
    256), or 32 with transformers. Halved after running out of memory, down to 16; from 256 where vLLM chose."""
    gpu_memory_utilization: Fraction = 0.8
    """Share of a GPU's memory that vLLM takes. After running out of memory the next attempt takes 0.1 less and samples
    fewer completions at once (`max_num_seqs`), and says so (V5)."""
    min_gpu_memory_utilization: Fraction | None = None
    """It goes no lower than this. null = 0.5, or `gpu_memory_utilization` where that is less."""
    cpu_kv_cache_gib: PositiveFloat = 1.0
    """Memory of vLLM's KV cache where there is no GPU, in GiB; halved after running out of memory."""
    batch_invariant: bool = True
    """vLLM's mode in which a sample does not depend on what else is in the batch, on GPUs that have it (from the H100
    on). Elsewhere, and with transformers, a few samples may differ."""
    merge_adapter: bool = False
    """Merge the LoRA adapter into the weights before sampling: about twice as fast, needs room for a merged copy."""
    stage_to: str | None = None
    """Folder on a node's own disk to which the base model is copied, once per node: `/local/$USER`,
    `${SCRATCH}/models`, `$TMPDIR` where that stays when a job ends. Variables are those of the node. null = load from
    where it lies."""
    load_strategy: Literal["auto", "lazy", "prefetch", "eager"] = "auto"
    """How vLLM reads safetensors. auto: prefetch from shared storage, lazy from `stage_to`."""
    keep_compiled: bool = True
    """Keep what vLLM compiles in the workspace from round to round, a folder for each task. false = compile anew."""
    speculate: bool = True
    """A task without work samples the last shards of others a second time; the first manifest wins."""

    @property
    def least_gpu_memory_utilization(self) -> float:
        """`min_gpu_memory_utilization` with its default resolved."""
        least = self.min_gpu_memory_utilization
        return min(USUAL_LEAST_SHARE, self.gpu_memory_utilization) if least is None else least

    def faults(self) -> Iterator[Fault]:
        """Truncated sampling; lengths without room for a prompt; GPUs that cannot be shared out."""
        if self.top_p != 1.0:
            yield Fault(("top_p",), f"{self.top_p} cuts the distribution, which biases the importance ratio", "1.0")
        if self.max_model_len is not None and self.max_model_len <= self.max_tokens:
            what = f"{self.max_model_len} leaves no room for a prompt beside max_tokens = {self.max_tokens}"
            yield Fault(("max_model_len",), what, "more than max_tokens, or null")
        if self.least_gpu_memory_utilization > self.gpu_memory_utilization:
            what = f"{self.min_gpu_memory_utilization} is above gpu_memory_utilization"
            yield Fault(("min_gpu_memory_utilization",), what, f"at most {self.gpu_memory_utilization}, or null")
        if self.stage_to is not None and not _NODE_PATH.fullmatch(self.stage_to):
            what = f"{self.stage_to!r} is no absolute path"
            yield Fault(
                ("stage_to",), what, "a path that begins with /, ~/, or a variable of the node: $TMPDIR", "or null"
            )
        if self.gpu_ids is not None:
            engines, wanted = self.data_parallel_size, self.data_parallel_size * (self.tensor_parallel_size or 1)
            uneven = len(self.gpu_ids) % engines or (self.tensor_parallel_size and len(self.gpu_ids) != wanted)
            if len(set(self.gpu_ids)) != len(self.gpu_ids):
                yield Fault(("gpu_ids",), f"{list(self.gpu_ids)} names a GPU twice", "each GPU once")
            elif not self.gpu_ids or uneven:
                what = f"{len(self.gpu_ids)} GPUs for data_parallel_size = {engines} engines"
                yield Fault(("gpu_ids",), what, "data_parallel_size × tensor_parallel_size GPUs, or null")


class SampleConfig(SamplingConfig):
    """Sampling the prompts of a round (B prompts, G samples of each)."""

    prompts_per_round: PositiveInt = 128
    """Prompts (B) of a round; rounds go through the training rows epoch by epoch in a seeded order."""
    accept: Literal["all", "well_formed"] = "all"
    """Which completions count towards `samples_per_prompt`. well_formed: those with all tags in order (L8); for each of
    the others one more is drawn with a new seed (V2, V3), and neither graded nor trained on."""
    max_tries_per_task: PositiveInt | None = None
    """Most completions drawn for one prompt (V2), with `accept: well_formed`. null = 4 × samples_per_prompt."""
    shard_size: PositiveInt = 16
    """Prompts of one shard, which is published at once. A task is at as many as fill its engine, and one more: that is
    what a lost task costs. Use more shards than array tasks."""

    def faults(self) -> Iterator[Fault]:
        """Too few tries."""
        yield from super().faults()
        if self.max_tries_per_task is not None and self.accept == "all":
            what = f"{self.max_tries_per_task}, but with accept: all every completion counts, so none is drawn again"
            yield Fault(("max_tries_per_task",), what, "null", "set it to null, or accept to well_formed")
        elif self.max_tries_per_task is not None and self.max_tries_per_task < self.samples_per_prompt:
            what = f"{self.max_tries_per_task} for samples_per_prompt = {self.samples_per_prompt}"
            yield Fault(("max_tries_per_task",), what, f"at least {self.samples_per_prompt}, or null")


class EvaluateConfig(Section):
    """The game on images and concepts that training never saw (L21)."""

    engine: Engine | None = None
    """What generates. null = `sample.engine`."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy."""
    batch_size: PositiveInt = 64
    """Games handed to the engine and to the listener at once."""
    sample_texts_to_log: NonNegativeInt = 8
    """Games whose image and description go to TensorBoard each round."""
