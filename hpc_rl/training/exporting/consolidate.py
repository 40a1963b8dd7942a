"""A trained model brought together on rank 0: its weights from all ranks, and its answer to a probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hpc_rl.training.exporting import export_verify
from hpc_rl.training.exporting.export_verify import Probe
from hpc_rl.training.models import ban_parameter

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Consolidated:
    """What is exported.

    Attributes
    ----------
    model
        The trained model; its own weights may still be spread over the ranks.
    state
        The trained weights, whole, on the CPU. With LoRA they are the adapter's.
    probe
        What it was asked, and what it answered: the exported folder must answer the same.
    """

    model: Any
    state: State
    probe: Probe


def gather(accelerator: Any, wrapped: Any, processor: Any) -> Consolidated | None:
    """The trained model on rank 0; None on the others. All ranks must call it.

    Parameters
    ----------
    accelerator
        Of the training.
    wrapped
        The model as training runs it: DeepSpeed's engine, wrapped by DDP or FSDP, or itself.
    processor
        Its tokenizer, or processor with one.
    """
    model = accelerator.unwrap_model(wrapped)
    probe = export_verify.ask(wrapped, model, processor, accelerator.device)
    state = _state(wrapped, model)
    if not accelerator.is_main_process:
        return None
    if is_peft_model(model):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=state)
    state.pop(ban_parameter(model), None)
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    return Consolidated(model, whole, probe)


def _state(wrapped: Any, model: Any) -> Any:
    """Weights by name; of a model with adapters at least what is trained. Whole on rank 0 only."""
    adapter_only = is_peft_model(model)
    if getattr(wrapped, "zero_optimization_partition_weights", bool)():  # DeepSpeed's engine, with ZeRO-3
        return wrapped._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter_only)
    if _is_sharded(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter_only)
        return get_model_state_dict(model, options=options)
    return model.state_dict()


def _is_sharded(model: Any) -> bool:
    """Whether FSDP has spread the weights over the ranks."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
