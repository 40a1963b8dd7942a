"""Pairs (S5, S7): properties of many rounds of made-up attempts; reference solutions; and the generator's weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.data.control_tokens import control_tokens
from hpc_rl.data.dpo import Attempts, Known, Pair, Pairing, key_of, schema
from hpc_rl.data.generator import usefulness
from hpc_rl.data.questions import Question
from hpc_rl.data.row_writer import ROWS, RowWriter
from hpc_rl.engines import loading
from hpc_rl.grading.answers import Checker
from hpc_rl.run.code import source_root

BASE = Question("q1", "Which?", "5", None, "q1", None, 0, "", "train", "initial")
EOS = "<|im_end|>"

text = st.sampled_from(["a", "b", "c", "d", " a", "a\n", "", "  ", f"x{EOS}", r"\boxed{5}"])
solutions = st.sampled_from([None, "", r"\boxed{5}", r"\boxed{6}", "a", f"5{EOS}"])
attempted = st.tuples(st.lists(text, max_size=6), st.lists(text, max_size=6))
rounds_of_attempts = st.lists(st.lists(attempted, min_size=3, max_size=3), min_size=1, max_size=3)


def prompt_of(question: Question) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question.question},)


def run(
    rounds: list[list[tuple[list[str], list[str]]]], solution: str | None, most: int, seed: int = 0
) -> tuple[list[list[Pair]], list[Pairing]]:
    """The pairs of each round, all earlier ones known, of three questions of which one is a variant of another."""
    questions = [
        replace(BASE, solution=solution),
        replace(BASE, question_id="q2", root_id="q2", question="What?", split="validation", solution=solution),
        replace(BASE, question_id="q2.r01", root_id="q2", parent_id="q2", question="Who?", split="validation"),
    ]
    made: list[list[Pair]] = []
    pairings = []
    for number, attempts in enumerate(rounds, 1):
        known = Known()
        known.add([key_of(pair.prompt, pair.chosen, pair.rejected) for before in made for pair in before])
        pairing = Pairing(number, seed, most, known, (EOS,), Checker("math"))
        pairings.append(pairing)
        made.append([
            pair
            for question, (right, wrong) in zip(questions, attempts, strict=True)
            for pair in pairing.pairs(question, prompt_of(question), Attempts(right, wrong))
        ])  # fmt: skip
    return made, pairings


@settings(max_examples=80, deadline=None)
@given(rounds_of_attempts, solutions, st.integers(1, 5))
def test_pairs_of_all_rounds_s5(
    rounds: list[list[tuple[list[str], list[str]]]], solution: str | None, most: int
) -> None:
    """S5: chosen are right, rejected are wrong, none twice, none above the cap, none that cannot be trained on."""
    made, pairings = run(rounds, solution, most)
    everything = [pair for pairs in made for pair in pairs]
    said = [(pair.prompt[0]["content"], pair.chosen.strip(), pair.rejected.strip()) for pair in everything]
    assert len(set(said)) == len(said) and all(chosen != rejected for _, chosen, rejected in said)
    assert len({pair.pair_id for pair in everything}) == len(everything)
    assert not any(EOS in one or not one for _, *both in said for one in both)
    places = {"q1": 0, "q2": 1, "q2.r01": 2}
    for attempts, pairs, pairing in zip(rounds, made, pairings, strict=True):
        for id, place in places.items():
            right, wrong = attempts[place]
            mine = [pair for pair in pairs if pair.question_id == id]
            assert len(mine) <= most
            assert all(pair.rejected in wrong for pair in mine)
            if right:
                assert all(pair.chosen in right and pair.chosen_from == "attempt" for pair in mine)
            else:
                assert all(pair.chosen == solution and pair.chosen_from == "reference" for pair in mine)
        assert pairing.counts["pairs_new"] == len(pairs)
        assert pairing.counts["questions_with_pairs"] == len({pair.question_id for pair in pairs})
    assert {pair.root_id for pair in everything if pair.question_id != "q1"} <= {"q2"}


@settings(max_examples=50, deadline=None)
@given(rounds_of_attempts, st.integers(0, 3))
def test_without_a_cap_all_of_right_times_wrong_is_there(
    rounds: list[list[tuple[list[str], list[str]]]], seed: int
) -> None:
    made, pairings = run(rounds, None, most=1000, seed=seed)
    usable: set[tuple[int, str, str]] = set()
    for attempts in rounds:
        for place, both in enumerate(attempts):
            right, wrong = ({one.strip() for one in some if one.strip() and EOS not in one} for some in both)
            usable |= {(place, *pair) for pair in product(right, wrong - right)}
    places = {"q1": 0, "q2": 1, "q2.r01": 2}
    assert {(places[p.question_id], p.chosen.strip(), p.rejected.strip()) for some in made for p in some} == usable
    assert sum(pairing.counts["pairs_new"] for pairing in pairings) == len(usable)


def test_which_pairs_are_cut_depends_on_seed_and_round_alone() -> None:
    attempts = [([f"right {n}" for n in range(4)], [f"wrong {n}" for n in range(4)]), ([], []), ([], [])]
    first, again, other = (run([attempts], None, 5, seed)[0][0] for seed in (0, 0, 1))
    assert first == again and len(first) == 5
    assert {(pair.chosen, pair.rejected) for pair in first} != {(pair.chosen, pair.rejected) for pair in other}
    assert run([attempts], None, 5)[1][0].counts["too_many"] == 11


@pytest.mark.parametrize(
    ("solution", "count"),
    [(None, "no_reference_solution"), (r"\boxed{6}", "wrong_reference_solution"), (f"{EOS}5", "control_tokens")],
)
def test_a_reference_solution_that_cannot_be_used_is_counted_s5(solution: str | None, count: str) -> None:
    made, (pairing,) = run([[([], ["a"]), ([r"\boxed{5}"], []), ([], [])]], solution, 8)
    assert made == [[]] and pairing.counts[count] == 1


def test_without_reference_solutions_a_question_that_failed_has_no_pairs() -> None:
    pairing = Pairing(1, 0, 8, Known(), (), None)
    question = replace(BASE, solution=r"\boxed{5}")
    assert pairing.pairs(question, prompt_of(question), Attempts([], ["a"])) == []
    assert pairing.pairs(question, prompt_of(question), Attempts(["b"], ["a"]))[0].chosen == "b"
    assert pairing.counts["no_reference_solution"] == 0


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
    def pair(number: int) -> Pair:
        return Pair(str(number), "q", "q", 1, ({"role": "user", "content": "so"},), "a", "b", "attempt")

    with RowWriter(tmp_path / "one", schema()) as writer:
        for number in range(3):
            writer.add(pair(number))
    with RowWriter(tmp_path / "many", schema()) as writer:
        writer.add(pair(-1))
        writer.add_table(pq.read_table(tmp_path / "one"))
        for number in range(3, ROWS + 5):
            writer.add(pair(number))
    assert pq.read_table(tmp_path / "many")["pair_id"].to_pylist() == [str(n) for n in range(-1, ROWS + 5)]
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
    with pytest.raises(ValueError, match=r"has none of tokenizer\.json, tokenizer_config\.json"):
        control_tokens(tmp_path / "nothing")
