"""Losses on the solutions of a question, against values worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.training.algorithms.pair_losses import loss

SCORES = torch.tensor([1.0, -0.5, 2.0, 0.25])
LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0])


def off(margin: float) -> float:
    """−log σ(margin)."""
    return log(1 + exp(-margin))


def value(kind: str, sizes: list[int] | None = None, **more: object) -> float:
    return float(loss(kind, SCORES, LABELS, sizes or [4], **more))  # type: ignore[arg-type]


def test_all_pairs_of_right_and_wrong_count_alike() -> None:
    by_hand = (off(1.5) + off(-1.0) + off(0.75) + off(-1.75)) / 4
    assert value("pairs") == pytest.approx(by_hand)


def test_each_question_counts_alike_however_many_solutions_it_has() -> None:
    scores, labels = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    first, second = off(1.0), (off(-1.5) + off(1.5)) / 2
    assert float(loss("pairs", scores, labels, [2, 3])) == pytest.approx((first + second) / 2)


@pytest.mark.parametrize(("draw", "margin"), [(0.0, 1.5), (0.3, -1.0), (0.6, 0.75), (0.99, -1.75)])
def test_the_hardest_pair_and_one_that_is_drawn(draw: float, margin: float) -> None:
    assert value("selected", draws=[draw]) == pytest.approx((off(0.25 - 2.0) + off(margin)) / 2)


def test_cross_entropy_of_each_solution() -> None:
    by_hand = (off(1.0) + off(0.5) + off(-2.0) + off(0.25)) / 4
    assert value("bce") == pytest.approx(by_hand)


@pytest.mark.parametrize("kind", ["pairs", "selected", "bce"])
def test_the_penalty_is_on_the_square_of_each_score(kind: str) -> None:
    squares = (1.0 + 0.25 + 4.0 + 0.0625) / 4
    draws = [0.5]
    assert value(kind, penalty=0.1, draws=draws) == pytest.approx(value(kind, draws=draws) + 0.1 * squares)


@pytest.mark.parametrize("kind", ["pairs", "selected"])
def test_a_question_without_a_pair_has_no_gradient_and_spoils_none(kind: str) -> None:
    scores = torch.tensor([1.0, -0.5, 3.0, 4.0], requires_grad=True)
    found = loss(kind, scores, torch.tensor([1.0, 0.0, 1.0, 1.0]), [2, 2], draws=[0.0, 0.0])  # type: ignore[arg-type]
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(off(1.5) / 2)
    assert scores.grad is not None and scores.grad[2:].tolist() == [0.0, 0.0] and scores.grad[0] != 0


questions = st.lists(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=2, max_size=6), min_size=1, max_size=4
)


@given(questions, st.sampled_from(["pairs", "selected", "bce"]))
def test_a_pass_of_several_questions_is_the_mean_of_passes_of_one(
    asked: list[list[tuple[float, bool]]], kind: str
) -> None:
    def one(some: list[list[tuple[float, bool]]]) -> float:
        scores = torch.tensor([score for question in some for score, _ in question])
        labels = torch.tensor([float(right) for question in some for _, right in question])
        draws = [0.4] * len(some)
        return float(loss(kind, scores, labels, [len(q) for q in some], penalty=0.3, draws=draws))  # type: ignore[arg-type]

    assert one(asked) == pytest.approx(sum(one([question]) for question in asked) / len(asked), abs=1e-5)
