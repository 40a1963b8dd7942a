"""What is used of TRL, imported without vLLM.

TRL imports vLLM when it is installed, to generate with it. Training here never does, and the import takes 3 seconds.
"""

from __future__ import annotations

import os

from trl import import_utils

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import_utils.is_vllm_available = lambda *_, **__: False

from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models import prepare_deepspeed  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

__all__ = ["GRPOConfig", "GRPOTrainer", "add_fused_lm_head", "prepare_deepspeed"]
