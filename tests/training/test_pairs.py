"""Pairs and solutions: read as texts or token ids, put together across files, left out and counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpc_rl.engines.loading import load_processor, tokenizer_of
from hpc_rl.training.data import pairs, solutions
from hpc_rl.training.errors import NothingToLearn, UnusableData

PAIRS = {
    "pair_id": ["a", "b"], "row_id": ["r0", "r1"], "prompt_token_ids": [[1, 2], [3]],
    "chosen_token_ids": [[4], [5, 6, 7]],
    "rejected_token_ids": [[8, 9], [5]],
}  # fmt: skip
SOLUTIONS = {
    "question_id": ["q", "r", "q", "r", "s", "q"], "solution_id": list("abcdef"), "label": [1, 0, 0, 0, 1, -1],
    "token_ids": [[1, 2], [3], [4, 5, 6], [7], [8], [9]],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(speaker: Path) -> Any:
    return tokenizer_of(load_processor(speaker))


def write(folder: Path, *tables: Mapping[str, Any]) -> list[Path]:
    files = [folder / f"{number}.parquet" for number in range(len(tables))]
    for file, columns in zip(files, tables, strict=True):
        pq.write_table(pa.table(dict(columns)), file)
    return files


def test_pairs_come_back_with_their_rows_and_lengths(tmp_path: Path) -> None:
    found = pairs.read(write(tmp_path, PAIRS), None, with_rows=True)
    one, other = found.rows(np.array([1, 0]))
    assert (one.id, one.row_id, one.prompt_ids.tolist()) == ("b", "r1", [3])
    assert (other.chosen_ids.tolist(), other.rejected_ids.tolist()) == ([4], [8, 9])
    assert found.lengths.tolist() == [4, 4], "the prompt and the longer answer"
    assert pairs.read(write(tmp_path, PAIRS), None).rows(np.array([0]))[0].row_id == ""


def test_pairs_of_further_files_are_only_measured(tmp_path: Path) -> None:
    """Read with the others, so no name may be there twice; an empty file is one of no pairs."""
    more = {**PAIRS, "pair_id": ["c", "d"], "chosen_token_ids": [[4], [5, 6, 7, 8]]}
    none = {name: pa.array([], pa.array(values).type) for name, values in PAIRS.items()}
    trained, measured, empty, again = write(tmp_path, PAIRS, more, none, PAIRS)
    every = pairs.read([trained], None, measured=[measured], max_length=4, too_long="drop")
    ours, others = pairs.split(every)
    assert [[one.id for one in units.rows(slice(None))] for units in (every, ours, others)] == [
        ["a", "b", "c"], ["a", "b"], ["c"]
    ]  # fmt: skip
    assert ours.numbers()["too_long"] == 0 and ours.numbers()["validation_too_long"] == 1
    assert [len(units) for units in pairs.split(pairs.read([empty], None, measured=[measured]))] == [0, 2]
    assert [len(units) for units in pairs.split(pairs.read([trained], None, measured=[empty]))] == [2, 0]
    with pytest.raises(UnusableData, match="pair_id a is there twice"):
        pairs.read([trained], None, measured=[again])


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_pairs_of_chats_share_their_prompt(tmp_path: Path, tokenizer: Any, variables: dict[str, Any]) -> None:
    chat = [{"role": "user", "content": "yes no"}]
    table = {"pair_id": ["a"], "prompt": [chat], "chosen": ["Yes"], "rejected": ["No"]}
    (pair,) = pairs.read(write(tmp_path, table), tokenizer, variables=variables).rows(np.array([0]))
    for answer, ids in (("Yes", pair.chosen_ids), ("No", pair.rejected_ids)):
        said = [*chat, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(said, tokenize=False, **variables)
        assert tokenizer.decode([*pair.prompt_ids, *ids]) == whole


def test_what_was_sampled_is_trained_on_and_texts_beside_it_are_not_read_s5(tmp_path: Path, tokenizer: Any) -> None:
    """An answer that was cut off in its thoughts gets no end, and a template that could not show it is not asked."""
    chat = [{"role": "user", "content": "yes no"}]
    texts = {"prompt": [chat] * 2, "chosen": ["<think>", "Yes"], "rejected": ["<|im_end|>", "Yes"]}
    found = pairs.read(write(tmp_path, {**PAIRS, **texts}), tokenizer).rows(slice(None))
    for name in ("prompt", "chosen", "rejected"):
        assert [getattr(pair, f"{name}_ids").tolist() for pair in found] == PAIRS[f"{name}_token_ids"]


@pytest.mark.parametrize(
    ("changed", "options", "complaint"),
    [
        (
            {"rejected_token_ids": [[8, 9], [5, 6, 7]]},
            {},
            r"row 1, pair_id b, column rejected: it is the chosen answer",
        ),
        ({"row_id": ["r0", None]}, {"with_rows": True}, r"row 1, pair_id b, column row_id: there is nothing"),
        ({}, {"max_length": 3}, r"row 0, pair_id a, .* ends at token 4, but max_length is 3"),
        ({"pair_id": ["a", "a"]}, {}, r"pair_id a is there twice"),
        ({}, {"vocabulary": 9}, r"row 0, pair_id a, column rejected_token_ids: it holds token 9"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(
    tmp_path: Path, changed: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UnusableData, match=complaint):
        pairs.read(write(tmp_path, {**PAIRS, **changed}), None, **options)


def test_prompts_with_pictures_must_be_token_ids(tmp_path: Path, tokenizer: Any) -> None:
    table = {"pair_id": ["a"], "row_id": ["r"], "prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}
    with pytest.raises(UnusableData, match=r"has the columns .* needed are prompt_token_ids and chosen_token_ids and"):
        pairs.read(write(tmp_path, table), tokenizer, with_rows=True)


def test_no_pair_left_says_how_many_were_too_long(tmp_path: Path) -> None:
    with pytest.raises(NothingToLearn, match="no pair is left: 2 were read, 2 are too long"):
        pairs.read(write(tmp_path, PAIRS), None, max_length=2, too_long="drop")


def test_solutions_of_a_question_come_together_from_all_files(tmp_path: Path) -> None:
    scores = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    table = pa.table({**SOLUTIONS, "score": scores})
    files = write(tmp_path, *(table.slice(start, 2).to_pydict() for start in (0, 2, 4)))
    found = solutions.read(files, None, both=False)
    questions = found.rows(np.arange(len(found)))
    assert [(one.id, [s.id for s in one.solutions]) for one in questions] == [
        ("q", ["a", "c"]), ("r", ["b", "d"]), ("s", ["e"])
    ]  # fmt: skip
    assert [(s.label, s.score, s.token_ids.tolist()) for s in questions[0].solutions] == [
        (1, 0.5, [1, 2]), (0, 1.5, [4, 5, 6])
    ]  # fmt: skip
    assert found.lengths.tolist() == [5, 2, 1] and found.left_out["unknown_label"] == 1
    only = solutions.read(files, None)
    assert [one.id for one in only.rows(np.arange(len(only)))] == ["q"], "the others are all wrong or all right"
    assert only.left_out == {"solutions": 2, "too_long": 0, "unknown_label": 1, "one_sided_questions": 2}
    short = solutions.read(files, None, both=False, max_length=2, too_long="drop")
    assert short.left_out["too_long"] == 1 and len(short.rows(np.array([0]))[0].solutions) == 1


def test_a_solution_that_is_text_is_read_as_the_service_reads_it(tmp_path: Path, tokenizer: Any, speaker: Path) -> None:
    from hpc_rl.engines.reward_model import RewardModel

    class NoJudge:
        def logits(self, rows: Any) -> list[float]:
            raise AssertionError("nothing is scored here")

    table = {
        "question_id": ["q", "q"], "solution_id": ["a", "b"], "question": ["yes no", "yes no"],
        "solution": ["Yes", "No"], "label": [1, 0],
    }  # fmt: skip
    for system in (None, "red green"):
        (question,) = solutions.read(write(tmp_path, table), tokenizer, system_prompt=system).rows(np.array([0]))
        service = RewardModel(str(speaker), NoJudge(), system_prompt=system)
        assert [s.token_ids.tolist() for s in question.solutions] == [
            service.encode("yes no", said) for said in ("Yes", "No")
        ]


@pytest.mark.parametrize(
    ("changed", "options", "complaint"),
    [
        ({"label": [1, 0, 2, 0, 1, 0]}, {}, r"row 2, solution_id c, column label: it is none of 1 \(right\)"),
        ({"label": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]}, {}, r"column label is double; expected is an integer"),
        ({}, {"pad_id": 6}, r"row 2, solution_id c, column token_ids: it ends in the padding token 6"),
        ({"solution_id": list("abcdea")}, {}, r"solution_id a is there twice"),
        ({"label": [1, 0, 1, 0, 1, -1]}, {}, r"no question is left: 6 .* 1 unknown_label, 3 one_sided_questions"),
    ],
)
def test_solutions_that_cannot_be_used_are_named(
    tmp_path: Path, changed: dict[str, Any], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UnusableData, match=complaint):
        solutions.read(write(tmp_path, {**SOLUTIONS, **changed}), None, **options)
