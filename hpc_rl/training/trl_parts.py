"""What is used of TRL, imported without vLLM.

TRL imports vLLM when it is installed, to generate with it. Training here never does, and the import takes 3 seconds.
"""

from __future__ import annotations

import os

from trl import import_utils

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import_utils.is_vllm_available = lambda *_, **__: False

from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.models import prepare_deepspeed, prepare_fsdp  # noqa: E402
from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    add_fused_lm_head,
    adjusted_mfu,
    compute_flops_per_token,
    compute_mfu,
    disable_dropout_in_model,
    get_peak_flops,
)

assert hasattr(dpo_trainer, "hash_module")
dpo_trainer.hash_module = lambda _: ""  # SHA-256 over all weights, to name a cache of log-probabilities: not used

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "add_fused_lm_head",
    "adjusted_mfu",
    "compute_flops_per_token",
    "compute_mfu",
    "disable_dropout_in_model",
    "get_peak_flops",
    "prepare_deepspeed",
    "prepare_fsdp",
]
