"""The config of a recipe that samples with engines of its own: their GPUs are those of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hpc_rl.config.base import Fault
from hpc_rl.config.gpu_shares import GpuShareError, count, share_gpus
from hpc_rl.config.phases import Engine, SamplingConfig
from hpc_rl.config.schema import Config


class SamplingRecipeConfig(Config):
    """A tree with the sections `sample` and `evaluate`, for a stage that samples and one that evaluates."""

    sampling_stage: ClassVar[str] = "sample"
    """The stage that samples."""

    if TYPE_CHECKING:  # each recipe declares them with a class, and in a place, of its own
        sample: SamplingConfig
        evaluate: Any

    @property
    def evaluation_engine(self) -> Engine:
        """`evaluate.engine` with its default resolved."""
        engine: Engine = self.evaluate.engine or self.sample.engine
        return engine

    def prompts_in(self, round: int, look: bool) -> int | None:
        """How many prompts a round samples, at most; None where the config does not tell, or with `look` its files."""
        return None

    def faults(self) -> Iterator[Fault]:
        """Engines without GPUs."""
        yield from super().faults()
        yield from self._gpu_faults()

    def notes(self) -> Iterator[str]:
        """GPUs of a sampling task that work as one because no field says otherwise."""
        yield from super().notes()
        sample, of_task = self.sample, self.stages[self.sampling_stage].gpus_per_node
        given = of_task if sample.gpu_ids is None else len(sample.gpu_ids)
        each = given // sample.data_parallel_size
        if of_task and each > 1 and sample.tensor_parallel_size is None:
            engines = "one engine" if sample.data_parallel_size == 1 else f"{sample.data_parallel_size} engines"
            apart = " each" * (sample.data_parallel_size > 1)
            yield (
                f"stages.{self.sampling_stage}: {engines} on {count(each)}{apart}, as "
                f"sample.tensor_parallel_size is null. For an engine on each GPU: sample.data_parallel_size = {given}"
            )

    def _gpu_faults(self) -> Iterator[Fault]:
        """Engines that ask for other GPUs than their stage has; a stage without GPUs takes whatever it finds."""
        sample, engine = self.sample, self.evaluation_engine
        of_sample, of_evaluate = (self.stages[name].gpus_per_node for name in (self.sampling_stage, "evaluate"))
        each = sample.tensor_parallel_size
        if of_sample:
            try:
                shares = share_gpus(
                    [str(gpu) for gpu in range(of_sample)], sample.data_parallel_size, sample.gpu_ids, each
                )
            except GpuShareError as error:
                yield Fault(("sample", error.field), error.what, way_out=error.way_out)
            else:
                yield from self._idle_gpus(of_sample, shares)
        if of_evaluate and engine != "transformers" and each is not None and each > of_evaluate:
            yield Fault(
                ("stages", "evaluate", "gpus_per_node"),
                f"{of_evaluate}, but its engine takes sample.tensor_parallel_size = {each}",
                f"at least {each}",
                "raise it, or set sample.tensor_parallel_size to null: all GPUs of a stage, shared among its engines",
            )

    def _idle_gpus(self, of_sample: int, shares: Sequence[Sequence[str]]) -> Iterator[Fault]:
        """GPUs of a sampling task that would be paid for and not used, unless `gpu_ids` says so."""
        sample = self.sample
        most = 1 if sample.engine == "transformers" else sample.tensor_parallel_size or len(shares[0])
        given = of_sample if sample.gpu_ids is None else len(sample.gpu_ids)
        if len(shares) * most < given:
            engines = f"{len(shares)} engine{'s' * (len(shares) > 1)}"
            of = " (transformers uses one each)" if sample.engine == "transformers" else ""
            what = f"{engines} of {count(most)}{of} leave {given - len(shares) * most} of the task's {given} idle"
            gpus = f"stages.{self.sampling_stage}.gpus_per_node"
            way_out = f"raise it, lower {gpus}, or name the GPUs to use in sample.gpu_ids"
            yield Fault(("sample", "data_parallel_size"), what, f"{given // most}", way_out)
