"""A second model that is trained in step with a trainer's own: its optimizer, its steps, its part of the checkpoints.

transformers' trainer knows one model. This one has an optimizer and a schedule of its own, and under DeepSpeed an
engine of its own, made with the trainer's config. Its forward and backward passes are the caller's, one for each of the
trainer's, so all ranks stay in step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import get_scheduler

from hpc_rl.config.training import SecondTrainConfig
from hpc_rl.training.base import Passes, check_losses
from hpc_rl.training.errors import Diverged

STATE = "state.pt"
EPSILON = 1e-8
"""AdamW's, as transformers has it."""


class Second:
    """A model beside a trainer's.

    Parameters
    ----------
    model, tokenizer
        Loaded after the trainer's settings were made, as the trainer's own.
    options
        How it is trained. The course of the learning rate is the trainer's.

    Attributes
    ----------
    wrapped
        The model as training runs it, once `prepare` was called.
    """

    wrapped: Any

    def __init__(self, model: Any, tokenizer: Any, options: SecondTrainConfig) -> None:
        self.model, self.tokenizer, self.export, self._options = model, tokenizer, options.export, options
        self._passes: Passes = []

    def prepare(self, trainer: Any, steps: int) -> None:
        """Wrap the model as the trainer has wrapped its own, which it must have done.

        Parameters
        ----------
        steps
            Optimizer steps in all.

        Raises
        ------
        ValueError
            With float16 without DeepSpeed.
        """
        args, self._accelerator, self._state = trainer.args, trainer.accelerator, trainer.state
        self._deepspeed = trainer.is_deepspeed_enabled
        assert not trainer.is_fsdp_enabled, "checked with the config"
        if self._accelerator.scaler is not None:
            raise ValueError("two models at once are not trained in float16 without DeepSpeed: use bfloat16")
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            if is_peft_model(self.model):
                self.model.enable_input_require_grads()
        self.model.train()
        decayed = set(trainer.get_decay_parameter_names(self.model))

        def schedule(optimizer: Any) -> Any:
            return get_scheduler(args.lr_scheduler_type, optimizer, self._options.warmup_steps, steps)

        if self._deepspeed:
            self._prepare_deepspeed(self._adamw(decayed), schedule)
        else:
            self.wrapped = self._accelerator.prepare_model(self.model)
            self._optimizer = self._adamw(decayed)
            self._scheduler = schedule(self._optimizer)

    def _adamw(self, decayed: Set[str]) -> Any:
        """The optimizer that the trainer has, with our numbers; weights that are not named do not decay."""
        options = self._options
        return torch.optim.AdamW(
            [
                {"params": [p for n, p in self._trained() if n in decayed], "weight_decay": options.weight_decay},
                {"params": [p for n, p in self._trained() if n not in decayed], "weight_decay": 0.0},
            ],
            lr=options.learning_rate, betas=options.adam_betas, eps=EPSILON, fused=torch.cuda.is_available(),
        )  # fmt: skip

    def _prepare_deepspeed(self, optimizer: Any, schedule: Any) -> None:
        import deepspeed
        from accelerate.utils import map_pytorch_optim_to_deepspeed

        config = deepcopy(self._accelerator.state.deepspeed_plugin.deepspeed_config)
        config["gradient_clipping"] = self._options.max_grad_norm
        config.pop("optimizer", None)  # with the trainer's numbers
        config.pop("scheduler", None)
        if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
            optimizer = map_pytorch_optim_to_deepspeed(optimizer)
        self.wrapped, self._optimizer, _, self._scheduler = deepspeed.initialize(
            model=self.model, optimizer=optimizer, lr_scheduler=schedule, config=config
        )

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a forward pass and its `backward`."""
        if self._deepspeed or self._accelerator.sync_gradients:
            yield
        else:
            with self._accelerator.no_sync(self.wrapped):
                yield

    def backward(self, loss: torch.Tensor, units: tuple[str, ...]) -> None:
        """The backward pass of a loss that is divided by the number of passes; with a step's last one, the step.

        Parameters
        ----------
        units
            What the loss is of, for messages.

        Raises
        ------
        Diverged
            On all ranks, when a loss of the step is not finite, or its gradients are not; nothing is saved then.
        """
        self._passes.append((torch.isfinite(loss.detach()).all(), units))
        last = self._accelerator.sync_gradients
        if last:
            passes, self._passes = self._passes, []
            check_losses(passes, self._accelerator, f"the second model's loss of step {self._state.global_step + 1}")
        if self._deepspeed:
            self.wrapped.set_gradient_accumulation_boundary(last)
            self.wrapped.backward(loss, scale_wrt_gas=False)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        if last:
            self._step()

    def _step(self) -> None:
        if self._deepspeed:
            self.wrapped.step()
            norm = self.wrapped.get_global_grad_norm()
            skipped = getattr(self._optimizer, "overflow", False)
            finite = not skipped and math.isfinite(float(norm))
            self._check_gradients(finite or self.wrapped.fp16_enabled())  # so float16 finds its loss scale
        else:
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in self._trained()], self._options.max_grad_norm)
            self._check_gradients(bool(torch.isfinite(norm)))
            self._optimizer.step()
            self._scheduler.step()
            self._optimizer.zero_grad()

    def _check_gradients(self, finite: bool) -> None:
        if not finite:
            step = self._state.global_step + 1
            raise Diverged(f"the second model's gradients of step {step} are not finite, though its losses are")

    def save(self, folder: Path) -> None:
        """Write what `load` needs. All ranks must call it."""
        if self._deepspeed:
            self.wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=is_peft_model(self.model))
        elif self._accelerator.is_main_process:
            folder.mkdir()
            trained = {name: parameter.detach() for name, parameter in self._trained()}
            state = {"model": trained, "optimizer": self._optimizer.state_dict()}
            torch.save({**state, "scheduler": self._scheduler.state_dict()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from what was saved. All ranks must call it, after `prepare`."""
        if self._deepspeed:
            found, _ = self.wrapped.load_checkpoint(str(folder), load_module_strict=not is_peft_model(self.model))
            assert found is not None, f"{folder} is part of a whole checkpoint"
            return
        state = torch.load(folder / STATE, map_location=self._accelerator.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)  # what is frozen is not in it
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
