"""Pairs (S5, S7): properties of many rounds of made-up attempts; reference solutions; and the generator's weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_rl.data.attempts import Answered, pieces
from hpc_rl.data.control_tokens import ControlTokens, control_tokens
from hpc_rl.data.dpo import Attempts, Known, Pair, Pairing, Solution, key_of
from hpc_rl.data.generator import Text, schema, usefulness
from hpc_rl.data.questions import Question
from hpc_rl.data.row_writer import ROWS, RowWriter
from hpc_rl.engines import loading
from hpc_rl.grading import samples
from hpc_rl.grading.solver import SolverGraded
from hpc_rl.run.code import source_root

BASE = Question("q1", "Which?", "5", None, "q1", None, 0, "", "train", "initial")
EOS = "<|im_end|>"

text = st.sampled_from(["a", "b", "c", "d", " a", "a\n", "", "  "])
solutions = st.sampled_from([None, "s", "a"])
attempted = st.tuples(st.lists(text, max_size=6), st.lists(text, max_size=6))
rounds_of_attempts = st.lists(st.lists(attempted, min_size=3, max_size=3), min_size=1, max_size=3)


def prompt_of(question: Question) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question.question},)


Said = tuple[str, str, str, str]
"""Of a pair: its question, what is asked, what is chosen, what is rejected."""


def run(
    rounds: list[list[tuple[list[str], list[str]]]], solution: str | None, most: int, seed: int = 0
) -> tuple[list[list[Pair]], list[list[Said]], list[Pairing]]:
    """The pairs of each round, all earlier ones known, of three questions of which one is a variant of another."""
    questions = [
        BASE,
        replace(BASE, question_id="q2", root_id="q2", question="What?", split="validation"),
        replace(BASE, question_id="q2.r01", root_id="q2", parent_id="q2", question="Who?", split="validation"),
    ]
    made: list[list[Pair]] = []
    said: list[list[Said]] = []
    pairings = []
    for number, attempts in enumerate(rounds, 1):
        known = Known()
        known.add([key_of(({"content": asked},), *both) for before in said for _, asked, *both in before])
        solve = None if solution is None else Solution(solution, (1, 2))
        pairing = Pairing(number, seed, most, known, lambda question, prompt, solve=solve: solve)
        pairings.append(pairing)
        made.append([])
        said.append([])
        for question, (right, wrong) in zip(questions, attempts, strict=True):
            for pair in pairing.pairs(question, prompt_of(question), Attempts(right, wrong)):
                chosen = pair.chosen.text if isinstance(pair.chosen, Solution) else right[pair.chosen]
                made[-1].append(pair)
                said[-1].append((pair.question_id, question.question, chosen, wrong[pair.rejected]))
    return made, said, pairings


@settings(max_examples=80, deadline=None)
@given(rounds_of_attempts, solutions, st.integers(1, 5))
def test_pairs_of_all_rounds_s5(
    rounds: list[list[tuple[list[str], list[str]]]], solution: str | None, most: int
) -> None:
    """S5: chosen are right, rejected are wrong, none twice, none above the cap, none that says nothing."""
    made, said, pairings = run(rounds, solution, most)
    everything = [(id, chosen.strip(), rejected.strip()) for some in said for id, _, chosen, rejected in some]
    assert len(set(everything)) == len(everything)
    assert all(chosen and rejected and chosen != rejected for _, chosen, rejected in everything)
    ids = [pair.pair_id for some in made for pair in some]
    assert len(set(ids)) == len(ids)
    places = {"q1": 0, "q2": 1, "q2.r01": 2}
    for attempts, pairs, pairing in zip(rounds, made, pairings, strict=True):
        for id, place in places.items():
            mine = [pair for pair in pairs if pair.question_id == id]
            assert len(mine) <= most
            assert all(isinstance(pair.chosen, Solution) != bool(attempts[place][0]) for pair in mine)
        assert pairing.counts["pairs_new"] == len(pairs)
        assert pairing.counts["questions_with_pairs"] == len({pair.question_id for pair in pairs})
    assert {pair.root_id for some in made for pair in some if pair.question_id != "q1"} <= {"q2"}


@settings(max_examples=50, deadline=None)
@given(rounds_of_attempts, st.integers(0, 3))
def test_without_a_cap_all_of_right_times_wrong_is_there(
    rounds: list[list[tuple[list[str], list[str]]]], seed: int
) -> None:
    _, said, pairings = run(rounds, None, most=1000, seed=seed)
    usable: set[tuple[str, str, str]] = set()
    for attempts in rounds:
        for id, both in zip(("q1", "q2", "q2.r01"), attempts, strict=True):
            right, wrong = ({one.strip() for one in some} - {""} for some in both)
            usable |= {(id, *pair) for pair in product(right, wrong - right)}
    assert {(id, chosen.strip(), rejected.strip()) for some in said for id, _, chosen, rejected in some} == usable
    assert sum(pairing.counts["pairs_new"] for pairing in pairings) == len(usable)


def test_which_pairs_are_cut_depends_on_seed_and_round_alone() -> None:
    attempts = [([f"right {n}" for n in range(4)], [f"wrong {n}" for n in range(4)]), ([], []), ([], [])]
    first, again, other = (run([attempts], None, 5, seed)[1][0] for seed in (0, 0, 1))
    assert first == again and len(first) == 5 and first != other
    assert run([attempts], None, 5)[2][0].counts["too_many"] == 11


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from([1.0, 0.0, None]), max_size=5), min_size=1, max_size=8),
    st.integers(1, 8), st.integers(1, 4),
)  # fmt: skip
def test_pieces_part_no_question_and_pairs_have_their_attempts_tokens(
    tmp_path: Path, rewards: list[list[float | None]], files: int, rows: int
) -> None:
    """Whatever the files and row groups: each question comes once, and a pair's tokens are its attempts'."""
    paths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "ROWS", rows)
        for number in range(files):
            paths.append(tmp_path / str(number))
            some = [
                SolverGraded(
                    f"s{group}-{n}", f"q{group}", "solver", group, n, True, (9, group), (group, n), (-1.0, -1.0),
                    f"{group} {n}", "stop", 0, "w", reward, reward is None, reward, None, "rule",
                )
                for group in range(number * len(rewards) // files, (number + 1) * len(rewards) // files)
                for n, reward in enumerate(rewards[group])
            ]  # fmt: skip
            samples.write_samples(paths[-1], some, SolverGraded)
        patch.setattr("hpc_rl.data.attempts.MOST_BYTES", 1)
        found: list[int] = []
        for piece in pieces(paths):
            pairs: list[tuple[Answered, Pair]] = []
            for answered in piece.answered():
                found.append(answered.place)
                expected = [n for n, reward in enumerate(rewards[answered.place]) if reward == 1]
                assert answered.attempts.right == [f"{answered.place} {n}" for n in expected]
                chosen: list[int | Solution] = [*range(len(answered.right)), Solution("so", (7, 7))]
                pairs += [
                    (answered, Pair(f"{answered.place}-{n}", "q", "q", 1, prompt_of(BASE), one, 0))
                    for n, one in enumerate(chosen) if answered.wrong
                ]  # fmt: skip
            for row in piece.pairs(pairs).to_pylist():
                group = int(row["pair_id"].split("-")[0])
                assert row["prompt_token_ids"] == [9, group]
                assert row["rejected_token_ids"] == [int(number) for number in row["rejected"].split()]
                solved = row["chosen_from"] == "reference"
                assert row["chosen_token_ids"] == ([7, 7] if solved else [int(n) for n in row["chosen"].split()])
                assert not solved or row["chosen"] == "so"
    assert found == [group for group, some in enumerate(rewards) if some]


def test_known_pairs_are_found_among_many() -> None:
    prompt = ({"role": "user", "content": "so"},)
    known = Known()
    for first in (0, 500):
        known.add([key_of(prompt, str(n), "x") for n in range(first, first + 500)])
    assert all(key_of(prompt, f" {n}\n", "x") in known for n in range(1000))
    assert not any(key_of(prompt, str(n), "x") in known for n in range(1000, 2000))
    assert key_of(prompt, "x", "0") not in known and key_of(prompt, "0", "x") not in Known()


def test_usefulness_of_a_question_s17() -> None:
    """S17: U(s) = exp(−(s − 0.5)² / (2 · 0.2²))."""
    assert usefulness(0.5) == 1
    assert [usefulness(s) for s in (0.3, 0.7, 0.0, 1.0)] == pytest.approx(
        [math.exp(-0.5), math.exp(-0.5), 0.0439369, 0.0439369]
    )


def test_rows_and_tables_are_written_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    def pair(number: int) -> Text:
        return Text(str(number), ({"role": "user", "content": "so"},), "a", 0.5)

    with RowWriter(tmp_path / "one", schema()) as writer:
        for number in range(3):
            writer.add(pair(number))
    with RowWriter(tmp_path / "many", schema()) as writer:
        writer.add(pair(-1))
        writer.add_table(pq.read_table(tmp_path / "one"))
        for number in range(3, ROWS + 5):
            writer.add(pair(number))
    assert pq.read_table(tmp_path / "many")["text_id"].to_pylist() == [str(n) for n in range(-1, ROWS + 5)]
    assert writer.rows == ROWS + 6
    with RowWriter(tmp_path / "none", schema()):
        pass
    assert pq.read_schema(tmp_path / "none") == schema()


def test_control_tokens_are_found_without_loading_the_tokenizer(tmp_path: Path) -> None:
    solver = source_root() / "models/tiny-solver"
    assert set(loading.control_tokens(loading.load_processor(solver))) <= set(control_tokens(solver))
    config = {
        "eos_token": {"content": EOS}, "pad_token": None, "additional_special_tokens": ["<|a|>"],
        "extra_special_tokens": {"image": "<|b|>"}, "model_max_length": 5,
        "added_tokens_decoder": {"1": {"content": "<|c|>", "special": True}, "2": {"content": "d", "special": False}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert control_tokens(tmp_path) == ("<|a|>", "<|b|>", "<|c|>", EOS)
    tokens = ControlTokens(tmp_path)
    assert [tokens.are_in(text) for text in (f"so{EOS}", "<|b|>", "d", "|")] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"has none of tokenizer\.json, tokenizer_config\.json"):
        control_tokens(tmp_path / "nothing")
