"""The part of the config that every recipe has: the run, the cluster, the resources of each stage, logging."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hpc_rl.config.base import (
    CommandPath,
    Fault,
    FilePath,
    FreeMapping,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    raise_faults,
)
from hpc_rl.config.errors import Problem
from hpc_rl.config.legacy import LegacyKey
from hpc_rl.config.services import ServicesConfig

SIGNAL_EARLY_S = 60
"""Slurm may send the signal of `--signal` this much earlier than asked (sbatch(1), "--signal")."""


class RunConfig(Section):
    """Which run this is, where it lives, and how patient it is with its own jobs."""

    name: str
    """Name of the run: part of its jobs' names. Letters, digits, dot, dash, underscore."""
    workspace: FilePath
    """Folder of the run, on storage that all nodes share. Default: `runs/NAME`"""
    seed: NonNegativeInt = 0
    """Every random number of the run comes from this one."""
    rounds: PositiveInt = 3
    """Rounds after the preparing round 0. May be raised later to go on."""
    lookahead: NonNegativeInt = 1
    """Rounds that are queued behind the running one, so that advancing is not on the critical path."""
    max_attempts: PositiveInt = 5
    """Submissions of one stage before the run stops with an explanation."""
    auto_retry: bool = True
    """Try again what failed. false: a stage that failed once stops the run; launch it again to go on."""
    retry_delay_s: NonNegativeFloat = 0
    """How long after a failed attempt the next one starts at the earliest. Seconds; 0 = at once. A job that was told
    to leave, or that takes less memory than before, is not kept waiting."""
    continue_on_failure: bool = False
    """Give up a stage that failed for good where the recipe can do without it, and go on. ProSetting's training is one:
    the round ends with the weights that it began with. false: the run stops and says why."""
    lease_ttl_s: PositiveFloat = 120
    """A task whose heartbeat is older than this has lost its shard to the next one that asks. Seconds; well above
    `cluster.file_system_lag_s`, or heartbeats that are only shown late look like death."""
    linger_s: NonNegativeFloat = 180
    """How long a task without a free shard waits for a lost one before it ends. Seconds."""
    gate_patience_s: NonNegativeFloat | None = None
    """How long a job looks for its inputs before it exits as blocked. Seconds; null = `cluster.file_system_lag_s`."""

    def faults(self) -> Iterator[Fault]:
        """A name that cannot be part of a job's name or of a folder's."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", self.name):
            expected = "a letter or digit, then letters, digits, dots, dashes, underscores; at most 80 together"
            yield Fault(("name",), repr(self.name), expected)


class ClusterConfig(Section):
    """The site: how jobs are submitted, and what all of them need. Usually a file of its own, taken in by `extends`."""

    executor: Literal["auto", "slurm", "local", "debug"] = "auto"
    """slurm: sbatch jobs. local: processes here. debug: in this process. auto: slurm where `sbatch` exists."""
    partition: str | None = None
    """Slurm partition of all stages that name none. null = the site's default."""
    account: str | None = None
    """Slurm account to charge. null = the user's default."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Node features to ask for, `a100|h100`."""
    setup: tuple[str, ...] = ()
    """Shell lines that run in every job before Python: `module load cuda`, `source env/bin/activate`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every job."""
    python: CommandPath | None = None
    """Interpreter of the jobs. null = the one that runs the launcher."""
    container: tuple[str, ...] | None = None
    """Command that is put before the interpreter: `[apptainer, exec, --nv, image.sif]`."""
    network_interface: str | None = None
    """Interface whose address other nodes can reach, `ib0`, for services and torch.distributed. null = by host name."""
    file_system_lag_s: NonNegativeFloat = 60
    """How late a file that another node wrote may become visible (attribute caches of NFS and Lustre). Seconds."""
    signal_delay_s: PositiveInt = 120
    """How long before its time limit a job is told to save and leave. Seconds; Slurm may be 60 s early."""
    sbatch: FreeMapping = Field(default_factory=dict)
    """More sbatch options for all stages, `{exclude: node13, reservation: course}`; long names without dashes."""
    advance: Literal["jobs", "login"] = "jobs"
    """Who submits the next round: a small job, or `launch --watch` on the login node where jobs may not submit."""
    max_array_size: PositiveInt | None = None
    """Largest array of one sbatch. null = ask Slurm (MaxArraySize)."""
    shared_roots: tuple[FilePath, ...] = ()
    """Folders that all nodes share. When given, the workspace must lie beneath one of them."""
    allow_local_workspace: bool = False
    """Accept a workspace on tmpfs, overlay or the like with executor slurm: for clusters that are one machine."""
    allow_no_gpu: bool = False
    """Let jobs whose GPUs CUDA does not show work on CPUs: for clusters that only play at having GPUs."""

    def faults(self) -> Iterator[Fault]:
        """Options that have a field of their own."""
        yield from sbatch_faults(self.sbatch)


class LocalConfig(Section):
    """The local executor: the same graph as processes on this machine."""

    max_parallel_tasks: PositiveInt = 2
    """Processes with work that run at once; services and advance come on top."""


class StageConfig(Section):
    """Resources of one stage's jobs. What is null comes from `cluster`; "" means none, although `cluster` has one."""

    nodes: PositiveInt = 1
    """Nodes of one job; more than one only for `train`."""
    ranks_per_node: PositiveInt | None = None
    """Processes on each node. null = one per GPU, or one."""
    tasks: PositiveInt = 1
    """Array elements that share the stage's shards; of a service, its replicas."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs on each node."""
    cpus_per_task: PositiveInt = 1
    """CPU cores of each process."""
    mem_gb: PositiveFloat | None = None
    """Memory on each node, in GiB. null = the partition's default."""
    time_min: PositiveInt = 60
    """Time limit of one job, in minutes. A job that needs longer saves, leaves and is resumed."""
    signal_delay_s: PositiveInt | None = None
    """Instead of `cluster.signal_delay_s`: training needs time for a step and a checkpoint. Seconds."""
    partition: str | None = None
    """Instead of `cluster.partition`."""
    account: str | None = None
    """Instead of `cluster.account`."""
    qos: str | None = None
    """Instead of `cluster.qos`."""
    constraint: str | None = None
    """Instead of `cluster.constraint`."""
    setup: tuple[str, ...] | None = None
    """Instead of `cluster.setup` (the stage's own environment: sampling's may differ from training's)."""
    env: dict[str, str] = Field(default_factory=dict)
    """Added to `cluster.env`; wins where both name a variable."""
    python: CommandPath | None = None
    """Instead of `cluster.python`."""
    container: tuple[str, ...] | None = None
    """Instead of `cluster.container`."""
    sbatch: FreeMapping = Field(default_factory=dict)
    """Added to `cluster.sbatch`; wins where both name an option."""

    @property
    def ranks(self) -> int:
        """Processes on each node, with the default resolved."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of one job: nodes × ranks on each."""
        return self.nodes * self.ranks

    def faults(self) -> Iterator[Fault]:
        """Ranks that share a GPU; options that have a field of their own."""
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            what = f"{self.ranks} ranks share {self.gpus_per_node} GPUs"
            yield Fault(("ranks_per_node",), what, "at most one rank per GPU", "lower it, or raise gpus_per_node")
        yield from sbatch_faults(self.sbatch)


class WandbConfig(Section):
    """Weights & Biases, when it is installed and asked for (L22)."""

    enabled: bool = False
    """Log to W&B too."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    """offline writes files to be synced by hand: compute nodes often have no internet. WANDB_MODE sets it."""
    project: str = "hpc_rl"
    """W&B project. WANDB_PROJECT sets it."""
    dir: FilePath | None = None
    """Where W&B writes. null = `wandb/` in the workspace. WANDB_DIR sets it."""


class LoggingConfig(Section):
    """What is written down while the run goes on (L22, L24)."""

    tensorboard: bool = True
    """Write TensorBoard events to `tb/` in the workspace."""
    wandb: WandbConfig = WandbConfig.model_construct()
    """Weights & Biases."""
    prediction_log: FilePath | None = None
    """JSON lines: time, step, prompt, description, scores, reward (L22). null = in the workspace. LOG_PATH sets it."""
    debug: bool = False
    """Per-rank debug files with raw completions and rewards (L24), and debug messages. DEBUG_MODE sets it."""
    log_every_steps: PositiveInt = 1
    """Training steps between two points in the logs."""


class Config(Section):
    """The tree that all recipes share. A recipe adds its own sections in a subclass."""

    stage_names: ClassVar[tuple[str, ...] | None] = None
    """Names that `stages` may have; None = any."""
    stage_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What stages have instead of `StageConfig`'s defaults."""
    array_stages: ClassVar[frozenset[str] | None] = None
    """Stages whose shards several tasks may share; None = any."""
    train_sections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Stages that train, by name, and the fields with a `TrainConfig` of each, one for each way that it may train; only
    these stages run on several nodes."""
    trained_models: ClassVar[Mapping[str, str]] = {}
    """The field with the model that each of these stages trains."""
    variables: ClassVar[Mapping[str, str]] = {}
    """Environment variables that set fields of this recipe, beside those of every recipe (`environment.NAMES`)."""
    legacy_keys: ClassVar[Mapping[str, LegacyKey]] = {}
    """Keys of a seed's own config file that a file may have instead of ours."""

    recipe: str = "lewis"
    """The recipe: a module of `hpc_rl.recipes`, or the dotted path of one of your own."""
    run: RunConfig
    """Which run, where, how long."""
    cluster: ClusterConfig = ClusterConfig.model_construct()
    """The site."""
    local: LocalConfig = LocalConfig.model_construct()
    """The local executor."""
    stages: dict[str, StageConfig] = Field(default_factory=dict)
    """Resources by stage name. A service's name has a dot: `grade.listener` serves `grade`."""
    services: ServicesConfig = ServicesConfig.model_construct()
    """Servers that jobs ask, and those that can be served by hand."""
    logging: LoggingConfig = LoggingConfig.model_construct()
    """Logs."""

    @property
    def gate_patience_s(self) -> float:
        """`run.gate_patience_s` with its default resolved, in seconds."""
        patience = self.run.gate_patience_s
        return self.cluster.file_system_lag_s if patience is None else patience

    def stage(self, name: str) -> StageConfig:
        """Resources of a stage with everything that it inherits from `cluster` filled in, and "" turned into None."""
        own, site = self.stages.get(name) or StageConfig(), self.cluster
        inherited = {}
        for key in ("signal_delay_s", "partition", "account", "qos", "constraint", "setup", "python", "container"):
            value = getattr(own, key)
            inherited[key] = getattr(site, key) if value is None else None if value == "" else value
        merged = {"env": {**site.env, **own.env}, "sbatch": {**site.sbatch, **own.sbatch}}
        return own.model_copy(update=inherited | merged)

    def models_elsewhere(self) -> Collection[str]:
        """Fields with a model that this run does not load, because somebody else serves it."""
        return ()

    @property
    def service_stages(self) -> Collection[str]:
        """Names of the stages that serve another one (`grade.listener`), of services that the run asks."""
        return [name for name in self.stages if "." in name]

    def file_problems(self, rows: bool = True) -> Iterator[Problem]:
        """What stands in the way that only the recipe knows of, in files above all; looked at before any submission.

        Without `rows` nothing is read that may be large: only whether it is there.
        """
        yield from ()

    def stage_extras(self, name: str) -> tuple[str, ...]:
        """Extras of setup.cfg that a stage's body needs beyond those of every stage of its kind."""
        return ()

    def notes(self) -> Iterator[str]:
        """What is no fault, and yet may not be what was meant; `launch` says it."""
        yield from ()

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        raise_faults(cls.unknown_stages(stages))
        return stages

    @classmethod
    def unknown_stages(cls, names: Iterable[str]) -> Iterator[Fault]:
        """One fault for each name that is no stage of the recipe."""
        known = cls.stage_names
        for name in names:
            if known is not None and name not in known:
                expected = f"one of {', '.join(known)}"
                yield Fault((name,), "the recipe has no such stage", expected, nearest(name, known))

    @model_validator(mode="before")
    @classmethod
    def _all_stages(cls, data: Any) -> Any:
        """Every stage of the recipe is there, with the recipe's defaults under what the user wrote."""
        given = data.get("stages") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(given, Mapping | None):
            return data
        names = [*(cls.stage_names or ()), *(name for name in given or {} if name not in (cls.stage_names or ()))]
        filled = {}
        for name in names:
            own = (given or {}).get(name)
            default = cls.stage_defaults.get(name, {})
            filled[name] = {**default, **own} if isinstance(own, Mapping) else (default if own is None else own)
        return {**data, "stages": filled}

    def faults(self) -> Iterator[Fault]:
        """Time limits that the signal would eat up; stages in shapes that they, or Slurm's jobs, cannot have.

        The signal must come when the work has long begun: with a limit near the delay, submitit's signal came before
        Python had a handler for it and killed healthy jobs.
        """
        for name, stage in self.stages.items():
            field = "cluster" if stage.signal_delay_s is None else f"stages.{name}"
            delay_s = stage.signal_delay_s or self.cluster.signal_delay_s
            needed_min = -(-2 * (delay_s + SIGNAL_EARLY_S) // 60)
            if stage.time_min < needed_min:
                yield Fault(
                    ("stages", name, "time_min"),
                    f"{stage.time_min} min is too short for {field}.signal_delay_s = {delay_s}: the signal may come "
                    f"{SIGNAL_EARLY_S} s early, and half of the limit must be left for work",
                    f"at least {needed_min} min",
                    f"raise time_min, or lower {field}.signal_delay_s",
                )
        yield from self.services.placement_faults(self.stages, self.service_stages)
        if self.stage_names is not None:
            yield from self._shape_faults()

    def _shape_faults(self) -> Iterator[Fault]:
        """Ranks of a stage that does not train; tasks of one that is a single job."""
        trained, arrays = ", ".join(self.train_sections), self.array_stages
        for name, stage in self.stages.items():
            if stage.world_size > 1 and name not in self.train_sections:
                what = f"{stage.nodes} nodes × {stage.ranks} ranks; only {trained or 'a training'} runs on several"
                way_out = "nodes: 1 and ranks_per_node: 1; more tasks where the stage is an array"
                if stage.ranks > 1 and "." not in name:
                    way_out += "; an engine on each GPU of a task: ranks_per_node: 1 and sample.data_parallel_size"
                yield Fault(("stages", name), what, "one process per job", way_out)
            if arrays is not None and stage.tasks > 1 and "." not in name and name not in arrays:
                yield Fault(("stages", name, "tasks"), f"{stage.tasks}, but {name} is one job", "1")


_SET_ELSEWHERE = frozenset({
    "array", "account", "chdir", "comment", "constraint", "cpus-per-task", "dependency", "error", "gpus-per-node",
    "job-name", "kill-on-invalid-dep", "mem", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable",
    "partition", "qos", "requeue", "no-requeue", "signal", "time", "wrap",
})  # fmt: skip


def sbatch_faults(options: Mapping[str, Any]) -> Iterator[Fault]:
    """Extra sbatch options that are not by long name, or that other fields or the executor set."""
    for key in options:
        if key.startswith("-"):
            yield Fault(("sbatch", key), "options go without dashes", repr(key.lstrip("-")))
        elif key.replace("_", "-") in _SET_ELSEWHERE:
            what = "this option is set from other fields of the config, or by the executor"
            yield Fault(("sbatch", key), what, way_out="remove it here")


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean …?`, or nothing when no valid name is near."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    close += [other for other in valid if len(name) > 2 and (name in other or other in name)]
    return f"did you mean {close[0]}?" if close else ""
