"""What a recipe may not ask of a training."""

from __future__ import annotations

from typing import Any

import pytest

from hpc_rl.config.modeling import TrainedModelConfig
from hpc_rl.config.training import TrainConfig
from hpc_rl.engines.weights import Role
from hpc_rl.training.task import TrainTask

PLAIN = Role("one", TrainedModelConfig(path="model"))
WITH_VARIABLES = Role("judge", TrainedModelConfig(path="model", chat_template_kwargs={"enable_thinking": False}))


def task(algorithm: str, role: Role, **more: Any) -> TrainTask:
    return TrainTask(algorithm, TrainConfig(), "section", role, 0, **more)


@pytest.mark.parametrize(("algorithm", "roles"), [
    ("reward_model", {"role": WITH_VARIABLES}), ("verifier", {"role": WITH_VARIABLES}),
    ("joint", {"role": PLAIN, "second": WITH_VARIABLES}),
])  # fmt: skip
def test_a_model_that_scores_solutions_has_no_variables_since_its_service_has_none(
    algorithm: str, roles: dict[str, Role]
) -> None:
    with pytest.raises(ValueError, match=rf"^judge.chat_template_kwargs: {algorithm} must show solutions as the"):
        task(algorithm, **roles)
    task(algorithm, PLAIN, second=PLAIN)
    task("joint", WITH_VARIABLES, second=PLAIN)
    task("dpo", WITH_VARIABLES)


def test_only_pairs_are_measured_for_validation() -> None:
    with pytest.raises(ValueError, match=r"^section names validation.parquet for validation, but only dpo measures"):
        task("rloo", PLAIN, validation="validation.parquet")
    task("dpo", PLAIN, validation="validation.parquet")
