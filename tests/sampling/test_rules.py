"""Rules: how many attempts a task gets, and which of them count."""

from __future__ import annotations

import pytest

from hpc_rl.sampling.rules import KAccepted, Outcome, VariedGroup

GOOD, BAD = Outcome(True), Outcome(False)


def scored(*scores: float) -> list[Outcome]:
    return [Outcome(True, score) for score in scores]


def test_k_are_drawn_at_once_and_one_more_for_each_that_is_refused() -> None:
    rule = KAccepted(k=3, max_tries=5)
    assert rule.wanted([]) == 3
    assert rule.wanted([None, GOOD, None]) == 0
    assert rule.wanted([None, BAD, None]) == 1
    assert rule.wanted([BAD, BAD, None]) == 2
    assert rule.wanted([BAD, BAD, None, BAD, None]) == 0, "five tries at most"
    assert rule.wanted([GOOD, BAD, GOOD, GOOD]) == 0


def test_k_accepted_is_enough_and_fewer_are_kept_but_exhausted() -> None:
    rule = KAccepted(k=2, max_tries=4)
    assert (rule.verdict([BAD, GOOD, GOOD]), rule.kept([BAD, GOOD, GOOD])) == ("enough", (1, 2))
    assert (rule.verdict([BAD, GOOD, BAD, BAD]), rule.kept([BAD, GOOD, BAD, BAD])) == ("exhausted", (1,))


def test_a_group_of_equal_scores_is_drawn_again_as_a_whole() -> None:
    rule = VariedGroup(size=3, max_groups=2)
    assert rule.wanted([]) == 3
    assert rule.wanted([*scored(1, 1), None]) == 0, "the third may differ"
    assert rule.wanted(scored(1, 1, 1)) == 3
    assert rule.wanted([*scored(1, 1, 1), None, *scored(0, 1)]) == 0
    assert rule.wanted(scored(1, 1, 0)) == 0
    varied = scored(1, 1, 1, 0, 1, 1)
    assert (rule.wanted(varied), rule.verdict(varied), rule.kept(varied)) == (0, "enough", (3, 4, 5))


def test_a_group_that_stays_equal_is_exhausted_and_nothing_of_it_is_kept() -> None:
    rule = VariedGroup(size=2, max_groups=2)
    equal = scored(1, 1, 0, 0)
    assert (rule.wanted(equal), rule.verdict(equal), rule.kept(equal)) == (0, "exhausted", ())


def test_only_accepted_attempts_of_a_group_are_compared() -> None:
    rule = VariedGroup(size=3, max_groups=2)
    assert rule.wanted([*scored(1, 1), Outcome(False, 0.0)]) == 3
    assert rule.kept([*scored(1, 0), Outcome(False)]) == (0, 1)
    assert rule.wanted([BAD, BAD, BAD]) == 3


def test_scores_that_differ_by_rounding_are_equal() -> None:
    assert VariedGroup(size=2, max_groups=2).wanted(scored(0.1 + 0.2, 0.3)) == 2


def test_an_accepted_attempt_without_a_score_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="an accepted attempt has none"):
        VariedGroup(size=2, max_groups=2).wanted([Outcome(True, 1.0), GOOD])


@pytest.mark.parametrize(("k", "max_tries"), [(0, 4), (3, 2)])
def test_k_beyond_its_tries_is_refused(k: int, max_tries: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= max_tries"):
        KAccepted(k, max_tries)


@pytest.mark.parametrize(("size", "max_groups"), [(1, 4), (2, 0)])
def test_a_group_of_one_varies_never(size: int, max_groups: int) -> None:
    with pytest.raises(ValueError, match="size >= 2 and max_groups >= 1"):
        VariedGroup(size, max_groups)
