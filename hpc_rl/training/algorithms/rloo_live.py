"""RLOO on samples that the trainer draws by itself, as TRL's does (Ahmadian et al. 2024, arXiv:2402.14740; S10).

The loss is that of `hpc_rl.training.algorithms.rloo`, and how completions are judged is that of
`hpc_rl.training.algorithms.grpo_live`.
"""

from __future__ import annotations

from hpc_rl.training.algorithms.grpo_live import Live, train_live
from hpc_rl.training.algorithms.rloo import Rloo, rloo_config
from hpc_rl.training.run import Trained, TrainRun


class LiveRloo(Live, Rloo):
    """RLOO on samples that the trainer draws by itself."""


def train(run: TrainRun) -> Trained | None:
    """See `hpc_rl.training.algorithms.Algorithm`."""
    return train_live(run, LiveRloo, rloo_config)
