"""Games show what they must: the target twice, its nearest look-alikes, and nothing that is held out from the set."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.data.games import build_games, nearest, share_of
from hpc_rl.data.image_folder import Catalog, Concept, ImageFolderError
from hpc_rl.data.lewis import SETS, GameRow


def some_catalog(concepts: int, held_out: int, views: int = 4, category: str = "cup") -> Catalog:
    def paths(split: str, name: str) -> tuple[str, ...]:
        return tuple(f"{split}/{category}/{name}/{i}.png" for i in range(views))

    return Catalog(
        category,
        tuple(
            Concept(category, f"c{i}", True, paths("train", f"c{i}") + paths("test", f"c{i}"), ())
            if i < held_out
            else Concept(category, f"c{i}", False, paths("train", f"c{i}"), paths("test", f"c{i}"))
            for i in range(concepts)
        ),
        (),
    )


def on_a_circle(catalog: Catalog, seed: int = 0) -> dict[str, np.ndarray]:
    angles = np.random.RandomState(seed).uniform(0, np.pi, len(catalog.concepts))
    return {
        concept.name: np.array([np.cos(a), np.sin(a)], dtype=np.float32)
        for concept, a in zip(catalog.concepts, angles, strict=True)
    }


def games(
    catalog: Catalog, set_name: str, number: int, *, k: int = 3, negatives_from: int | None = None
) -> list[GameRow]:
    return build_games(
        catalog,
        on_a_circle(catalog),
        set_name,
        number,
        k=k,
        negatives_from=negatives_from,
        seed=7,
        speaker_problem="What is it?",
    )


def concept_of(path: str) -> str:
    return PurePosixPath(path).parts[2]


def test_neighbours_are_those_of_highest_cosine_similarity() -> None:
    degrees = {"a": 0, "b": 10, "c": -25, "d": 40, "e": 180}
    circle = {name: np.array([np.cos(np.radians(x)), np.sin(np.radians(x))], np.float32) for name, x in degrees.items()}
    assert nearest(circle, "a", list("edcba"), 3) == ["b", "c", "d"]
    assert nearest(circle, "d", list("abcde"), 9) == ["b", "a", "c", "e"]
    assert nearest(circle, "a", ["a", "c", "e"], 2) == ["c", "e"]


def test_equally_near_ones_come_by_name() -> None:
    same = {name: np.ones(1, np.float32) for name in "dcba"}
    assert nearest(same, "b", list("dca"), 3) == ["a", "c", "d"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(0, 6),
    st.integers(0, 4),
    st.integers(0, 40),
    st.sampled_from(SETS),
    st.integers(0, 5),
)
def test_every_game_is_sound(k: int, more: int, held_out: int, number: int, set_name: str, wider: int) -> None:
    catalog = some_catalog(k + more + held_out, held_out)
    rows = games(catalog, set_name, number, k=k, negatives_from=k - 1 + wider)
    is_held_out = {concept.name: concept.held_out for concept in catalog.concepts}
    if set_name == "validation" and held_out == 0:
        assert rows == []
        return
    assert len(rows) == number
    assert len({row.id for row in rows}) == number
    for row in rows:
        assert concept_of(row.image) == row.concept
        assert len(row.ret_paths) == len(row.names) == k
        assert row.names == tuple("ABCDE"[:k])
        assert row.names[row.label] == row.solution
        assert concept_of(row.ret_paths[row.label]) == row.concept
        assert row.ret_paths[row.label] != row.image  # another view
        assert len({concept_of(path) for path in row.ret_paths}) == k
        assert is_held_out[row.concept] == (set_name == "validation")
        shown = [row.image, *row.ret_paths]
        if set_name == "train":
            assert all(path.startswith("train/") and not is_held_out[concept_of(path)] for path in shown)
        if set_name == "new_views":
            assert all(path.startswith("test/") and not is_held_out[concept_of(path)] for path in shown)
        if set_name == "validation":
            assert all(is_held_out[concept_of(path)] or path.startswith("test/") for path in shown)


def test_distractors_are_the_nearest_of_the_set() -> None:
    catalog = some_catalog(12, 3)
    circle = on_a_circle(catalog)
    for set_name in SETS:
        allowed = [concept.name for concept in catalog.concepts if set_name == "validation" or not concept.held_out]
        for row in games(catalog, set_name, 30):
            distractors = {concept_of(path) for path in row.ret_paths} - {row.concept}
            assert distractors == set(nearest(circle, row.concept, allowed, 2))


def test_drawn_distractors_vary_within_the_nearest() -> None:
    catalog = some_catalog(12, 3)
    circle = on_a_circle(catalog)
    allowed = [concept.name for concept in catalog.concepts if not concept.held_out]
    seen: dict[str, set[str]] = {}
    for row in games(catalog, "train", 180, negatives_from=4):
        seen.setdefault(row.concept, set()).update({concept_of(path) for path in row.ret_paths} - {row.concept})
    for name, distractors in seen.items():
        assert distractors == set(nearest(circle, name, allowed, 4))


def test_targets_take_turns_and_labels_are_even() -> None:
    rows = games(some_catalog(12, 3), "train", 900)
    assert set(Counter(row.concept for row in rows).values()) == {100}
    assert all(250 < count < 350 for count in Counter(row.label for row in rows).values())


def test_the_first_games_do_not_depend_on_how_many_follow() -> None:
    catalog = some_catalog(9, 2)
    assert games(catalog, "train", 10) == games(catalog, "train", 50)[:10]


def test_too_small_a_pool_is_an_error() -> None:
    with pytest.raises(ImageFolderError, match=r"negatives_from=1 is less than the 2 distractors of data.k=3"):
        games(some_catalog(9, 2), "train", 1, negatives_from=1)


@given(st.integers(0, 1000), st.integers(1, 30))
def test_shares_add_up_and_differ_by_at_most_one(total: int, shards: int) -> None:
    shares = [share_of(total, index, shards) for index in range(shards)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
