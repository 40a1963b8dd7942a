"""YAML with places: extends, merging, duplicated keys, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.config.errors import ConfigError
from hpc_rl.config.source import Tree, parse_value, parse_yaml, read_yaml

keys = st.text("abc", min_size=1, max_size=2)
values = st.none() | st.integers() | st.text("xyz", max_size=3) | st.lists(st.integers(), max_size=2)
trees = st.recursive(
    st.dictionaries(keys, values, max_size=3), lambda inner: st.dictionaries(keys, values | inner, max_size=3)
)


def as_tree(data: dict[str, Any], name: str) -> Tree:
    return parse_yaml(yaml.safe_dump(data), name)


def leaves(data: Any, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(data, dict) and data:
        return {path: value for key, child in data.items() for path, value in leaves(child, (*at, key)).items()}
    return {at: data}


@given(trees)
def test_what_is_dumped_is_parsed_back(data: dict[str, Any]) -> None:
    assert as_tree(data, "f").data == data


@given(trees, trees)
def test_every_leaf_of_the_upper_file_wins_and_says_so(base: dict[str, Any], over: dict[str, Any]) -> None:
    tree = as_tree(base, "base")
    tree.merge(as_tree(over, "over"))
    merged = leaves(tree.data)
    for path, value in leaves(over).items():
        if value != {}:
            assert merged[path] == value
            assert tree.place(path).startswith("over:")


@given(trees, trees)
def test_what_the_upper_file_does_not_mention_stays_with_its_place(base: dict[str, Any], over: dict[str, Any]) -> None:
    tree = as_tree(base, "base")
    tree.merge(as_tree(over, "over"))
    merged, upper = leaves(tree.data), leaves(over)
    for path, value in leaves(base).items():
        overlaps = any(path[: len(other)] == other or other[: len(path)] == path for other in upper)
        if path and not overlaps:
            assert merged[path] == value
            assert tree.place(path).startswith("base:")


@given(trees)
def test_merging_a_file_into_itself_changes_nothing(data: dict[str, Any]) -> None:
    tree = as_tree(data, "f")
    tree.merge(as_tree(data, "f"))
    assert tree.data == data


@given(trees, trees, trees)
def test_extends_is_associative(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    left, right, inner = as_tree(a, "a"), as_tree(a, "a"), as_tree(b, "b")
    left.merge(as_tree(b, "b"))
    left.merge(as_tree(c, "c"))
    inner.merge(as_tree(c, "c"))
    right.merge(inner)
    # Not where a value of b, in between, hides a mapping of a from one of c: there the order of merging shows.
    if not any(isinstance(node, dict) for node in hidden(a, b, c)):
        assert left.data == right.data


def hidden(a: Any, b: Any, c: Any) -> list[Any]:
    found = []
    for key in set(a) & set(b) & set(c):
        if isinstance(a[key], dict) and isinstance(b[key], dict) and isinstance(c[key], dict):
            found += hidden(a[key], b[key], c[key])
        elif isinstance(c[key], dict) and not isinstance(b[key], dict):
            found.append(a[key])
    return found


@given(st.lists(keys, min_size=1, max_size=4), values)
def test_set_puts_a_value_and_its_place(path: list[str], value: Any) -> None:
    tree = Tree({"a": 1, "b": {"a": 2}}, {("a",): "f:1"})
    tree.set(tuple(path), value, "--set")
    found: Any = tree.data
    for key in path:
        found = found[key]
    assert found == value
    assert tree.place(tuple(path)) == "--set"


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "0.0000005", "5E-7", "+5e-7"])
def test_scientific_numbers_are_numbers(text: str) -> None:
    assert parse_value(text) == pytest.approx(5e-7)


@pytest.mark.parametrize("text", ["e5", "1e", "abc1e5", "0x1e", "1e5x"])
def test_what_only_looks_like_a_number_is_not_a_float(text: str) -> None:
    assert not isinstance(parse_value(text), float)


def test_extends_goes_through_folders_and_the_last_of_a_list_wins(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "common.yaml").write_text("a: 1\nb: {c: 1, d: 1}\n")
    (tmp_path / "site" / "gpu.yaml").write_text("extends: common.yaml\nb: {c: 2}\n")
    (tmp_path / "more.yaml").write_text("\nb: {d: 3}\n")
    (tmp_path / "run.yaml").write_text("extends: [site/gpu.yaml, more.yaml]\ne: 4\n")
    tree = read_yaml(tmp_path / "run.yaml")
    assert tree.data == {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}
    assert tree.place(("b", "c")).endswith("gpu.yaml:2")
    assert tree.place(("b", "d")).endswith("more.yaml:2")
    assert tree.place(("a",)).endswith("common.yaml:1")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    tree = parse_yaml("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n", "f")
    assert tree.data["b"] == {"p": 1, "q": 3}
    assert tree.place(("b", "q")) == "f:4"


def test_an_empty_file_is_an_empty_config() -> None:
    assert parse_yaml("# nothing\n", "f").data == {}


def test_a_duplicated_key_is_an_error_even_deep_down() -> None:
    with pytest.raises(ConfigError, match=r"f:3: a\.b: the key is there twice, first in line 2"):
        parse_yaml("a:\n  b: 1\n  b: 2\n", "f")


def test_all_duplicated_keys_are_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a: 1\na: 2\nb: 1\nb: 2\n", "f")
    assert [problem.field for problem in caught.value.problems] == ["a", "b"]


def test_files_that_extend_each_other_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml → .*b\.yaml → .*a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_every_missing_file_is_reported_with_the_line_that_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# site\nextends: [no.yaml, neither.yaml]\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert [problem.where.rsplit("/", 1)[-1] for problem in caught.value.problems] == ["a.yaml:2", "a.yaml:2"]
    assert all("no such file" in problem.what for problem in caught.value.problems)
