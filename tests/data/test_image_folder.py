"""A folder of pictures becomes a catalog: concepts held out by the seed, pictures set aside, mistakes named."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc_rl.data.image_folder import (
    Catalog,
    ImageFolderError,
    catalog,
    check_folder,
    list_categories,
    split_concepts,
)
from hpc_rl.data.images import UnreadableImage
from hpc_rl.run.seeds import seeded_order

names = st.lists(st.text("abcdefgh-", min_size=1, max_size=6), min_size=2, max_size=30, unique=True)


def folder_of(root: Path, views: Mapping[str, int]) -> Path:
    """Tiny pictures: `views` says how many lie in each `<split>/<category>/<concept>`."""
    for place, number in views.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for view in range(number):
            Image.new("RGB", (4, 4), (view, 0, 0)).save(root / place / f"{view}.png")
    return root


def cups(root: Path, *, train: int = 4, test: int = 2, concepts: int = 5) -> Path:
    splits = {"train": train} | ({"test": test} if test else {})
    return folder_of(root, {f"{s}/cup/mug{i}": n for s, n in splits.items() for i in range(concepts)})


def read(root: Path, *, skip_unreadable: bool = False, new_views_per_concept: int = 2) -> Catalog:
    return catalog(
        root,
        "cup",
        k=3,
        validation_fraction=0.2,
        split_seed=7,
        new_views_per_concept=new_views_per_concept,
        skip_unreadable=skip_unreadable,
    )


@given(names, st.integers(0, 5), st.randoms())
def test_the_order_depends_on_the_seed_not_on_the_order_given(
    items: list[str], seed: int, shuffler: random.Random
) -> None:
    shuffled = items[:]
    shuffler.shuffle(shuffled)
    assert seeded_order(items, seed, "x") == seeded_order(shuffled, seed, "x")
    assert sorted(seeded_order(items, seed, "x")) == sorted(items)


def test_orders_of_different_purposes_differ() -> None:
    items = [str(i) for i in range(50)]
    orders = [seeded_order(items, seed, part) for seed in (0, 1) for part in ("x", "y")]
    assert len({tuple(order) for order in orders}) == 4


@given(names, st.integers(2, 5), st.floats(0, 0.9), st.integers(0, 3))
def test_held_out_concepts_leave_enough_to_train_on(items: list[str], k: int, fraction: float, seed: int) -> None:
    if len(items) < k:
        with pytest.raises(ImageFolderError, match=f"needs at least {k}"):
            split_concepts(items, "cup", k=k, fraction=fraction, seed=seed)
        return
    held_out = split_concepts(items, "cup", k=k, fraction=fraction, seed=seed)
    assert held_out <= set(items)
    assert len(items) - len(held_out) >= k
    assert len(held_out) == min(round(fraction * len(items)), len(items) - k)


@given(names.filter(lambda items: len(items) >= 10), st.integers(0, 3))
def test_a_new_concept_moves_at_most_one_other_across_the_split(items: list[str], seed: int) -> None:
    before = split_concepts(items, "cup", k=2, fraction=0.3, seed=seed)
    after = split_concepts([*items, "newcomer"], "cup", k=2, fraction=0.3, seed=seed)
    assert len(before - after) <= 1


def test_categories_split_independently() -> None:
    items = [str(i) for i in range(20)]
    splits = {split_concepts(items, category, k=3, fraction=0.5, seed=7) for category in ("cup", "dog", "hat")}
    assert len(splits) == 3


def test_new_views_come_from_the_test_split(tmp_path: Path) -> None:
    found = read(cups(tmp_path))
    assert [concept.name for concept in found.concepts] == [f"mug{i}" for i in range(5)]
    assert sum(concept.held_out for concept in found.concepts) == 1
    for concept in found.concepts:
        if concept.held_out:
            assert (len(concept.train_views), len(concept.new_views)) == (6, 0)
        else:
            assert concept.train_views == tuple(f"train/cup/{concept.name}/{i}.png" for i in range(4))
            assert concept.new_views == tuple(f"test/cup/{concept.name}/{i}.png" for i in range(2))


def test_without_a_test_split_pictures_are_set_aside(tmp_path: Path) -> None:
    found = read(cups(tmp_path, train=5, test=0))
    kept_apart = set()
    for concept in found.concepts:
        if concept.held_out:
            assert len(concept.train_views) == 5
        else:
            assert (len(concept.train_views), len(concept.new_views)) == (3, 2)
            assert not set(concept.train_views) & set(concept.new_views)
            kept_apart.add(tuple(Path(path).name for path in concept.new_views))
    assert len(kept_apart) > 1  # not the same file names everywhere
    assert read(tmp_path) == found


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_folder_gives_a_sound_catalog_or_a_named_mistake(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    concepts = data.draw(st.lists(st.text("abc é", min_size=1, max_size=3).filter(str.strip), max_size=6, unique=True))
    views = {
        f"{split}/cup/{concept}": data.draw(st.integers(0, 4))
        for split in data.draw(st.sampled_from([["train"], ["train", "test"]]))
        for concept in concepts
    }
    root = folder_of(tmp_path_factory.mktemp("folder"), {"train/cup": 0, **views})
    try:
        found = read(root)
    except ImageFolderError as mistake:
        assert "cup" in str(mistake)
        assert "Add" in str(mistake)
        return
    assert [concept.name for concept in found.concepts] == sorted(concepts)
    shown = [path for concept in found.concepts for path in (*concept.train_views, *concept.new_views)]
    assert len(shown) == len(set(shown)) == sum(views.values())
    assert all((root / path).is_file() for path in shown)
    assert all(len(concept.train_views) >= 2 for concept in found.concepts)
    assert sum(not concept.held_out for concept in found.concepts) >= 3


def test_files_that_are_no_pictures_are_passed_over(tmp_path: Path) -> None:
    cups(tmp_path)
    (tmp_path / "train/cup/mug0/notes.txt").write_text("a mug")
    (tmp_path / "train/cup/mug0/._0.png").write_bytes(b"resource fork")
    (tmp_path / "train/.cache").mkdir()
    assert read(tmp_path).concepts[0].train_views[0] == "train/cup/mug0/0.png"
    assert len(read(tmp_path).concepts[0].train_views) in (4, 6)
    assert list_categories(tmp_path) == ["cup"]


def test_an_unreadable_picture_stops_or_is_left_out_as_configured(tmp_path: Path) -> None:
    cups(tmp_path)
    whole = (tmp_path / "train/cup/mug1/2.png").read_bytes()
    (tmp_path / "train/cup/mug1/2.png").write_bytes(whole[:50])
    with pytest.raises(UnreadableImage, match=r"train/cup/mug1/2\.png .*unreadable_image=skip"):
        read(tmp_path)
    found = read(tmp_path, skip_unreadable=True)
    assert found.skipped == ("train/cup/mug1/2.png",)
    assert all("mug1/2.png" not in path for path in found.concepts[1].train_views if path.startswith("train"))


def test_too_few_concepts_are_named_with_the_ways_out(tmp_path: Path) -> None:
    cups(tmp_path, concepts=2)
    with pytest.raises(ImageFolderError, match=r"'cup' has 2 concept\(s\) \(mug0, mug1\).*data.k=3.*data.categories"):
        read(tmp_path)


def test_too_few_pictures_are_named_with_the_ways_out(tmp_path: Path) -> None:
    cups(tmp_path)
    lonely = next(concept.name for concept in read(tmp_path).concepts if not concept.held_out)
    for view in (1, 2, 3):
        (tmp_path / f"train/cup/{lonely}/{view}.png").unlink()
    with pytest.raises(ImageFolderError, match=rf"cup/{lonely} has 1 readable picture\(s\) for training games.*Add"):
        read(tmp_path)


def test_pictures_set_aside_for_new_views_must_be_two(tmp_path: Path) -> None:
    cups(tmp_path, test=0)
    with pytest.raises(ImageFolderError, match=r"1 readable picture\(s\) for new-view games.*new_views_per_concept"):
        read(tmp_path, new_views_per_concept=1)


def test_a_folder_of_another_layout_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ImageFolderError, match=r"train/<category>/<concept>"):
        list_categories(tmp_path)


def test_the_check_before_submission_finds_what_needs_no_decoding(tmp_path: Path) -> None:
    cups(tmp_path)
    check_folder(tmp_path, ["cup"], k=3, skip_unreadable=False)
    with pytest.raises(ImageFolderError, match=r"no category 'dog'.*there are: cup"):
        check_folder(tmp_path, ["dog"], k=3, skip_unreadable=False)
    with pytest.raises(ImageFolderError, match="needs at least 6"):
        check_folder(tmp_path, ["cup"], k=6, skip_unreadable=False)
    (tmp_path / "test/cup/mug0/x.jpg").write_text("no picture")
    with pytest.raises(UnreadableImage, match=r"test/cup/mug0/x\.jpg"):
        check_folder(tmp_path, ["cup"], k=3, skip_unreadable=False)
    check_folder(tmp_path, ["cup"], k=3, skip_unreadable=True)
