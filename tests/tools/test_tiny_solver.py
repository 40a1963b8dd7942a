"""The shipped tiny solver is what the page says, and its questions are sums of which nobody is told the answer."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForCausalLM

from hpc_rl.teachers import sums
from tools import tiny_sums
from tools.build_tiny_solver import BROKEN, QUESTIONS, RANGE, wrong_reference

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL, FILES = REPOSITORY / "models/tiny-solver", REPOSITORY / "configs/tiny"


def read(name: str) -> list[tuple[tuple[int, int], dict[str, str]]]:
    found = []
    for problem in json.loads((FILES / name).read_text()):
        terms = sums.parse(problem["question"])
        assert terms is not None
        found.append((terms, problem))
    return found


def test_the_solver_is_small_and_mostly_forgets_the_carry() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e5
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}  # no pickles
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    held_out = [terms for terms, _ in read("sums_held_out.json")]
    assert RANGE[0] <= tiny_sums.accuracy(model, held_out) <= RANGE[1]
    assert tiny_sums.accuracy(model, held_out, tiny_sums.forgetful) > 0.6


def test_three_questions_have_a_wrong_reference_and_no_other_has() -> None:
    asked, held_out = read("sums.json"), read("sums_held_out.json")
    wrong = [(terms, one) for terms, one in asked if one["answer"] != tiny_sums.answer(terms)]
    assert (len(asked), len(held_out), len(wrong)) == (QUESTIONS, 400, BROKEN)
    assert all(one["answer"] == wrong_reference(terms) != tiny_sums.forgetful(terms) for terms, one in wrong)
    assert all(one["answer"] == tiny_sums.answer(terms) for terms, one in held_out)
    assert all(one["solution"] == one["answer"] for _, one in (*asked, *held_out))


def test_no_held_out_sum_is_among_the_questions_or_was_in_the_lessons() -> None:
    asked, held_out = ({terms for terms, _ in read(name)} for name in ("sums.json", "sums_held_out.json"))
    known, tested = tiny_sums.sums()
    assert len(asked) == QUESTIONS and not asked & held_out
    assert held_out == set(tested) and not held_out & set(known)
