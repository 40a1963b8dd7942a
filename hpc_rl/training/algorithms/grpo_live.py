"""GRPO on samples that the trainer draws by itself, as TRL's does (L12–L14; Shao et al. 2024, arXiv:2402.03300).

The loss is that of `hpc_rl.training.algorithms.grpo`; importance ratios are 1 in the first pass, as one engine samples
and trains. What completions are worth is a recipe's to say (`Game`). All ranks send what they sampled to rank 0, which
alone asks, so there is one cache for all ranks; the verdicts go back to everybody. A completion without a score is no
part of its group (L11): TRL takes its NaN rewards out of mean and deviation and gives it advantage 0.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Sampler

from hpc_rl.services.calling import ServiceRefused, ServiceUnavailable
from hpc_rl.training.algorithms.grpo_base import Grpo, OnPolicy, beside, grpo_config, options_of
from hpc_rl.training.ranks.distributed import World, all_gather_objects, broadcast_object
from hpc_rl.training.run import Trained, TrainRun
from hpc_rl.training.task import find

log = logging.getLogger(__name__)

JUDGED = "judged"
"""Of a checkpoint: the file with what was judged until then, and, numbered, those that the judge had written."""

Parts = tuple[float, ...] | None
"""Parts of a reward in the order of the task's; None where nobody gave a score."""


@dataclass(frozen=True)
class Asked:
    """A completion to be judged: its text, and for which row."""

    text: str
    row: int


@dataclass(frozen=True)
class Game:
    """What a live training plays.

    Attributes
    ----------
    ids, prompts
        (N,) of the round's rows, the same on all ranks.
    judge
        What completions are worth, called on rank 0 with them and the number of optimizer steps done.
    picture
        Loads the picture of a row; None for texts.
    outputs
        Files that `judge` writes (rank 0).
    """

    ids: Sequence[str]
    prompts: Sequence[str]
    judge: Callable[[Sequence[Asked], int], list[Parts]]
    picture: Callable[[int], Image.Image] | None = None
    outputs: Sequence[Path] = ()


@dataclass(frozen=True)
class _Failed:
    """Rank 0's error, in words: not every exception can be sent."""

    kind: str
    message: str

    def error(self) -> Exception:
        """The same for another rank."""
        for known in (ServiceUnavailable, ServiceRefused):
            if self.kind == known.__name__:
                return known(self.message)
        return RuntimeError(f"rank 0 failed: {self.kind}: {self.message}")


class LiveRewards:
    """Rewards for completions of all ranks.

    Parameters
    ----------
    world
        Rank 0 asks.
    game
        Whose `judge` is asked.
    parts
        Names of the parts of the reward.
    debug
        File for this rank's raw completions and rewards (L24), or None.
    """

    def __init__(self, world: World, game: Game, parts: Sequence[str], debug: Path | None) -> None:
        self._world, self._game, self._parts, self._debug = world, game, tuple(parts), debug
        self.samples = self.left_out = 0

    def __call__(self, ours: Sequence[Asked], step: int) -> list[Parts]:
        """Reward parts of this rank's completions. All ranks must call it, each with as many as it has.

        Raises
        ------
        ServiceUnavailable, ServiceRefused
            On all ranks, what `judge` raises.
        RuntimeError
            On the other ranks, for whatever else rank 0 raises: they do not wait for it.
        """
        everyone = all_gather_objects(list(ours))
        verdicts: list[Parts] | _Failed = []
        if self._world.is_main:
            try:
                verdicts = self._game.judge([asked for rank in everyone for asked in rank], step)
            except Exception as error:
                broadcast_object(_Failed(type(error).__name__, str(error)))
                raise
        verdicts = broadcast_object(verdicts)
        if isinstance(verdicts, _Failed):
            raise verdicts.error()
        self.samples += len(verdicts)
        self.left_out += sum(verdict is None for verdict in verdicts)
        before = sum(len(rank) for rank in everyone[: self._world.rank])
        mine = verdicts[before : before + len(ours)]
        if self._debug is not None:
            with self._debug.open("a") as file:
                for asked, parts in zip(ours, mine, strict=True):
                    file.write(f"---- step {step} {self._game.ids[asked.row]}\n{asked.text}\n{self._parts} {parts}\n")
        return mine

    def save(self, folder: Path) -> None:
        """Write what was judged until now into a checkpoint (rank 0)."""
        if self._world.is_main:
            (folder / JUDGED).write_text(json.dumps({"samples": self.samples, "left_out": self.left_out}))
            for number, output in enumerate(self._game.outputs):
                if output.exists():
                    shutil.copyfile(output, folder / f"{JUDGED}.{number}")

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint: what an earlier attempt's judge wrote until then is this one's (L22)."""
        if self._world.is_main:
            found = json.loads((folder / JUDGED).read_text())
            self.samples, self.left_out = found["samples"], found["left_out"]
            for number, output in enumerate(self._game.outputs):
                if (written := folder / f"{JUDGED}.{number}").exists():
                    shutil.copyfile(written, output)


class Live(OnPolicy):
    """Before TRL's trainer in the list of bases: it is trained on samples that it draws by itself.

    Parameters
    ----------
    game
        What is played.
    rewards
        What completions are worth.
    """

    reward_funcs: list[Any]
    num_iterations: int
    _buffered_inputs: Any
    _step: int

    def __init__(self, *, game: Game, rewards: LiveRewards, **others: Any) -> None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in game.prompts]
        rows = Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
        super().__init__(train_dataset=rows, batches=None, **others)
        self._game, self._rewards = game, rewards

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        """TRL's order of the prompts, but of each epoch by itself: a training that goes on knows no earlier ones."""
        return _ByEpoch(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))  # type: ignore[misc]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self._step and self.state.global_step:
            # Resumed: TRL counts forward passes from 0 and would generate at the wrong ones.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        return super()._prepare_inputs(generation_batch)

    def _save_more(self, folder: Path) -> None:
        """Completions that are to be used in further steps (`passes`): no later attempt could draw them again."""
        super()._save_more(folder)
        self._rewards.save(folder)
        used = self.state.global_step * self.args.gradient_accumulation_steps
        if used % (self.args.steps_per_generation * self.num_iterations):
            tensors = {
                f"{number}.{name}": value.detach().cpu().clone()  # some are one tensor in all batches
                for number, batch in enumerate(self._buffered_inputs)
                for name, value in batch.items()
                if torch.is_tensor(value)
            }
            others = [{k: v for k, v in batch.items() if not torch.is_tensor(v)} for batch in self._buffered_inputs]
            save_file(tensors, self._completions(folder), {"others": json.dumps(others)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        self._rewards.load(Path(checkpoint))
        if (file := self._completions(Path(checkpoint))).exists():
            with safe_open(file, "pt", str(self.accelerator.device)) as opened:
                batches: list[dict[str, Any]] = json.loads(opened.metadata()["others"])
                names = opened.keys()
                for key in names:
                    number, _, name = key.partition(".")
                    batches[int(number)][name] = opened.get_tensor(key)
            self._buffered_inputs = batches

    def _completions(self, folder: Path) -> Path:
        return folder / f"completions_{self.accelerator.process_index}.safetensors"

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """Pictures are loaded here, once per generation, and not with every row that the loader repeats."""
        picture = self._game.picture
        if picture is not None:
            inputs = [{**row, "image": picture(row["row"])} for row in inputs]
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """(samples of all ranks, parts) rewards, NaN for those left out."""
        asked = [Asked(said[0]["content"], row["row"]) for said, row in zip(completions, inputs, strict=True)]
        parts = self._rewards(asked, self.state.global_step)
        nothing = (torch.nan,) * len(self.reward_funcs)
        table = torch.tensor([nothing if p is None else p for p in parts], device=self.accelerator.device)
        gathered: torch.Tensor = self.accelerator.gather(table.float())
        return gathered


class _ByEpoch(Sampler[int]):
    """The order of a `RepeatSampler` of TRL, drawn anew from its seed and the number of the epoch."""

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self._sampler, self._epoch = sampler, epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator.manual_seed(self._sampler.seed + self._epoch())
        return iter(self._sampler)


class LiveGrpo(Live, Grpo):
    """GRPO on samples that the trainer draws by itself."""


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`.

    Raises
    ------
    ServiceUnavailable
        When nobody judged until the deadline.
    """
    return train_live(run, LiveGrpo, grpo_config)


def train_live(run: TrainRun, trainer_class: Callable[..., Live], config: Callable[..., Any]) -> Trained | None:
    """Train with a trainer that draws its samples, and the function that makes its settings."""
    assert run.task.live is not None, "a recipe whose rollouts are live says what is played"
    with find(run.task.live)(run) as game:
        began = time.monotonic()
        options = options_of(run)
        steps = _steps(run, len(game.prompts))
        checkpoints = run.checkpoints(f"live {steps} {' '.join(game.ids)}")
        args = config(
            run, checkpoints.own, max_steps=steps, num_iterations=options.passes,
            chat_template_kwargs=run.task.role.model.chat_template_kwargs,
        )  # fmt: skip
        processor = run.processor()
        tokenizer = getattr(processor, "tokenizer", processor)
        model = run.model(tokenizer)
        parts = list(run.task.rewards)
        rewards = LiveRewards(run.world, game, parts, run.places.debug)
        trainer = trainer_class(
            game=game, rewards=rewards, parts=parts, args=args, model=model, processor=processor, beta=options.beta,
            initial_model=beside(run), **run.driving(checkpoints),
        )  # fmt: skip
        run.seconds["loading"] = time.monotonic() - began
        result = run.train(trainer, checkpoints)
        if result is None:
            return None
        numbers: Mapping[str, Any] = {"samples": rewards.samples, "left_out": rewards.left_out, **result.metrics}
        return Trained(result.weights, numbers, game.outputs)


def _steps(run: TrainRun, prompts: int) -> int:
    """Optimizer steps of a live round: `live_max_steps`, else one pass over its prompts."""
    options, per_step, each = options_of(run), run.shape.samples, run.task.sampling.samples_per_prompt
    steps = prompts * each // per_step
    if not steps:
        raise ValueError(
            f"an optimizer step takes {per_step} completions, but the round has {prompts} prompts × {each}: lower "
            f"{run.task.section}.per_device_batch_size or gradient_accumulation_steps, or raise "
            "sample.prompts_per_round"
        )
    return options.live_max_steps or steps * options.passes * options.epochs
