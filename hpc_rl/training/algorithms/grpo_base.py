"""What GRPO and RLOO, on stored and on live rollouts, have in common: TRL's settings, and the initial model of KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_rl.config.training import GrpoTrainConfig, OnPolicyTrainConfig
from hpc_rl.engines.loading import tokenizer_of
from hpc_rl.training import settings
from hpc_rl.training.base import Driven
from hpc_rl.training.run import TrainRun
from hpc_rl.training.trl_parts import GRPOConfig, GRPOTrainer, add_fused_lm_head, prepare_deepspeed, prepare_fsdp


def options_of(run: TrainRun) -> OnPolicyTrainConfig:
    """The run's section for GRPO or RLOO."""
    options = run.task.settings
    assert isinstance(options, OnPolicyTrainConfig)
    return options


def common(run: TrainRun, output: Path) -> dict[str, Any]:
    """Settings of TRL's trainers for both."""
    options, sampling = options_of(run), run.task.sampling
    return {
        **settings.common(run, output),
        "num_generations": sampling.samples_per_prompt,
        "max_completion_length": sampling.max_tokens,
        "temperature": sampling.temperature,
        "epsilon": options.epsilon,
        "epsilon_high": options.epsilon_high,
        "beta": 0.0,  # the trainer sets it later: TRL would take the round's first policy for the initial model
        "reward_weights": list(run.task.rewards.values()),
    }


def grpo_config(run: TrainRun, output: Path, **more: Any) -> GRPOConfig:
    """Settings of TRL's trainer. Make them before the model: with ZeRO-3 they decide how models are loaded."""
    options = options_of(run)
    assert isinstance(options, GrpoTrainConfig)
    return GRPOConfig(**common(run, output), loss_type=options.loss_type, scale_rewards=options.scale_rewards, **more)


class OnPolicy(Driven):
    """Before TRL's trainer in the list of bases: gives it a KL term to the run's initial model.

    Parameters
    ----------
    parts
        Names of the parts of the reward.
    beta
        Weight of the KL term.
    initial_model
        Loads the model that KL is measured to; not called where there is no KL. None where batches come with its
        log-probabilities, and where it is the policy without its adapter (`beside`).
    """

    model: Any
    temperature: float

    def __init__(
        self, *, processor: Any, parts: list[str], beta: float, initial_model: Callable[[], Any] | None, **others: Any
    ) -> None:
        super().__init__(processing_class=processor, reward_funcs=[_named(part) for part in parts], **others)
        self.beta, self.ref_model = beta, None
        if beta and initial_model is not None:
            self.ref_model = self._prepare_reference(initial_model())

    def _prepare_reference(self, model: Any) -> Any:
        add_fused_lm_head(model, temperature=self.temperature)
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:  # type: ignore[attr-defined]
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)


class Grpo(OnPolicy, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer. dapo is a sum over tokens of the whole step, the other losses are means of a forward pass."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.mean_over_rows = self.loss_type != "dapo"


def beside(run: TrainRun) -> Callable[[], Any] | None:
    """What loads the run's initial model, to be asked with each batch; None where it is the policy without its adapter.

    It is not where a round before left a merged model: then the adapter lies on that one.
    """
    section = run.task.role.model
    if section.lora is not None and run.start.base == str(section.path):
        return None
    return lambda: run.initial_model(tokenizer_of(run.processor()))


def _named(part: str) -> Callable[..., list[float]]:
    """A name for TRL's list of reward functions, which is never called: rewards are computed in other places."""

    def never(**_: Any) -> list[float]:
        raise AssertionError(f"the reward {part} is not computed here")

    never.__name__ = part
    return never
