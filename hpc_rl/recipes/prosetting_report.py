"""Progressive solver training's rounds in the report (S11, S18): answers, zones, pools, teachers, pairs."""

from __future__ import annotations

from hpc_rl.recipes.columns import Column, Table

REPORT = (
    Table(
        "held-out questions",
        (
            Column("pass@1", "evaluate", "accuracy", "share of right answers, over all attempts", trend=True),
            Column("pass@k", "evaluate", "pass_at_k", "share of questions that one of the attempts solved", trend=True),
        ),
        about="{n_held_out} questions, {n_attempts} attempts",
        about_stage="evaluate",
    ),
    Table(
        "attempts and their grades",
        (
            Column("attempts", "grade", "samples"),
            Column("reward", "grade", "mean_reward", "over graded attempts", "mean", ("right", "wrong"), trend=True),
            Column("right", "grade", "right"),
            Column("wrong", "grade", "wrong"),
            Column("left out", "grade", "left_out", "attempts without a verdict, neither right nor wrong"),
            Column("by rule", "grade", "graded_by_rule"),
            Column("by teacher", "grade", "graded_by_teacher"),
        ),
    ),
    Table(
        "questions by zone, and the pool that came of them",
        (
            Column("questions", "grade", "questions"),
            Column("mastered", "grade", "zone_mastered", "all attempts are right: a harder variant is written"),
            Column("learning", "grade", "zone_learning", "some are: a variant aimed at the failure"),
            Column("too hard", "grade", "zone_too_hard", "none is: they come again, their references are checked"),
            Column("ungraded", "grade", "zone_ungraded"),
            Column("enhanced", "pool", "enhanced"),
            Column("broken", "pool", "broken", "questions whose reference answer was found wrong: they leave the pool"),
            Column("unasked", "pool", "unasked", "questions that are too long to be asked: they leave the pool"),
            Column("next pool", "pool", "questions"),
            Column("diversity", "pool", "diversity", "share of different word pairs in the next pool (distinct-2)"),
        ),
    ),
    Table(
        "teachers: who judges attempts and references, and who writes variants",
        (
            Column("judge: calls", "grade", "teacher_calls"),
            Column("tokens", "grade", "teacher_completion_tokens", "that the judge wrote"),
            Column("errors", "grade", "teacher_errors", "what the judge was asked about in vain"),
            Column("references", "grade", "checked_references", "that the judge looked at: nobody solved the question"),
            Column("writer: calls", "enhance", "teacher_calls"),
            Column("its tokens", "enhance", "teacher_completion_tokens"),
            Column("bad replies", "enhance", "dropped_bad_reply", "of the writer, after being asked again: dropped"),
        ),
    ),
    Table(
        "pairs",
        (
            Column("new", "dpo_data", "pairs_new"),
            Column("train", "dpo_data", "pairs_train", "of all rounds in the window"),
            Column("validation", "dpo_data", "pairs_validation"),
            Column("val. loss", "train", "validation_loss", "DPO's loss of the validation pairs after the training"),
            Column("val. accuracy", "train", "validation_accuracy"),
        ),
    ),
)  # fmt: skip
