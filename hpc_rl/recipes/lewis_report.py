"""The Lewis game's rounds in the report: accuracy, rewards, and what was left out."""

from __future__ import annotations

from hpc_rl.recipes.columns import Column, Table

REPORT = (
    Table(
        "identification accuracy",
        (
            Column("new views", "evaluate", "accuracy_new_views"),
            Column("held-out", "evaluate", "accuracy_validation", trend=True),
            Column("true", "evaluate", "true_validation",
                   "share of descriptions of held-out concepts that are true (rendered scenes only)"),
            Column("format", "evaluate", "format_rate"),
            Column("reward", "train", "mean_reward", "mean over the round's samples, before its training", trend=True),
            Column("equal groups", "train", "equal_groups", "groups whose rewards are all equal: no gradient"),
            Column("left out", "train", "left_out", "samples that could not be scored"),
        ),
        about="chance {chance:.2f}, in {n_new_views} games on new views of training concepts and {n_validation} on "
        "held-out concepts",
        about_stage="evaluate",
    ),
)  # fmt: skip
