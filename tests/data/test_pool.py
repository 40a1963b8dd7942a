"""S9: what the next pool has, whatever the rounds gave; the split of its questions (S5); how diverse it is (S18)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.data.diversity import SAMPLE, diversity
from hpc_rl.data.pool import NextPool, Variant, next_pool
from hpc_rl.data.question_split import split_roots
from hpc_rl.data.questions import text_key
from hpc_rl.data.regroup import write_batches
from hpc_rl.grading.results import ZONES

TEXTS = [f"How much is {i}?" for i in range(30)]
HELD_OUT = {text_key(text) for text in TEXTS[:5]}


def decide(ids: Sequence[str], zones: Sequence[Any], **given: Any) -> NextPool:
    """A next pool where nothing else is said."""
    defaults: dict[str, Any] = {
        "broken": (), "unasked": (), "variants": (), "seen": set(), "held_out": set(),
        "replay_fraction": 0.2, "max_questions": None, "seed": 0, "round": 1,
    }  # fmt: skip
    return next_pool(ids, zones, **{**defaults, **given})


@dataclass(frozen=True)
class Asked:
    """A question of the simulated run."""

    id: str
    text: str
    parent: str | None
    root: str
    split: str


@dataclass
class Run:
    """A simulated run: every round's zones, variants and broken references come from hypothesis."""

    draw: st.DataObject
    fraction: float
    limit: int | None
    pool: list[Asked] = field(default_factory=list)
    ever: dict[str, Asked] = field(default_factory=dict)
    """All questions that were in a pool."""

    def play(self, round: int, order: random.Random) -> None:
        ids = [one.id for one in self.pool]
        number = len(ids)
        zones = self.draw.draw(st.lists(st.sampled_from(ZONES), min_size=number, max_size=number))
        broken = {
            id for id, zone in zip(ids, zones, strict=True) if zone == "too_hard" and self.draw.draw(st.booleans())
        }
        new = [
            Asked(f"{one.id}.r{round:02d}", self.draw.draw(st.sampled_from(TEXTS)), one.id, one.root, one.split)
            for one, zone in zip(self.pool, zones, strict=True)
            if zone in ("mastered", "learning") and self.draw.draw(st.booleans())
        ]
        variants = [Variant(one.id, str(one.parent), text_key(one.text.upper())) for one in new]
        given: dict[str, Any] = {
            "broken": broken,
            "seen": {text_key(one.text) for one in self.ever.values()},
            "held_out": HELD_OUT,
            "replay_fraction": self.fraction,
            "max_questions": self.limit,
            "round": round,
        }
        decided = decide(ids, zones, variants=variants, **given)
        order.shuffle(variants)
        assert decide(ids, zones, variants=variants, **given) == decided, "the order of the variants does not count"
        self.check(ids, zones, broken, decided)
        again = [one for one, fate in zip(self.pool, decided.fates, strict=True) if fate in ("failed", "replay")]
        self.pool = [*again, *(one for one in new if decided.enhanced_to.get(str(one.parent)) == one.id)]
        assert len(self.pool) == decided.questions
        assert len(new) == len(decided.enhanced_to) + decided.duplicates_dropped + decided.held_out_dropped + (
            decided.variants_cut
        )

    def check(self, ids: list[str], zones: list[Any], broken: set[str], decided: NextPool) -> None:
        by_id = dict(zip(ids, zip(zones, decided.fates, strict=True), strict=True))
        failed = {id for id, (zone, _) in by_id.items() if zone in ("too_hard", "ungraded")} - broken
        others = len(ids) - len(failed) - len(broken)
        fates = {fate: {id for id, (_, one) in by_id.items() if one == fate} for fate in ("failed", "replay", "cut")}
        assert {id for id, (_, fate) in by_id.items() if fate == "broken"} == broken
        assert not (fates["replay"] & failed)
        assert fates["failed"] <= failed
        drawn = round(self.fraction * others)
        if self.limit is None:
            assert fates["failed"] == failed
            assert (len(fates["replay"]), len(fates["cut"]), decided.variants_cut) == (drawn, 0, 0)
        else:
            wanted = drawn + len(failed) + len(decided.enhanced_to) + decided.variants_cut
            assert decided.questions == min(self.limit, wanted)
            assert len(fates["cut"]) + decided.variants_cut == wanted - decided.questions
            if fates["failed"] != failed:
                assert not fates["replay"], "replayed ones go before failed ones"
            if decided.variants_cut:
                assert not (fates["replay"] or fates["failed"]), "and new ones go last"

    def remember(self) -> None:
        for one in self.pool:
            self.ever.setdefault(one.id, one)


@given(
    st.data(),
    st.integers(2, 12),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.none() | st.integers(1, 10),
    st.randoms(use_true_random=False),
)
def test_s9_over_rounds_nothing_is_there_twice_nothing_leaks_and_provenance_is_complete(
    data: st.DataObject, size: int, fraction: float, limit: int | None, order: random.Random
) -> None:
    ids = [f"q{i:06d}" for i in range(size)]
    splits = split_roots(ids, held_out=0.0, validation=0.3, seed=0)
    run = Run(data, fraction, limit)
    run.pool = [Asked(id, TEXTS[5 + i], None, id, splits[id]) for i, id in enumerate(ids)]
    run.remember()
    for round in range(1, 5):
        before = {one.id for one in run.pool}
        run.play(round, order)
        keys = [text_key(one.text) for one in run.pool]
        assert len(set(keys)) == len(keys), "no question is there twice"
        assert not HELD_OUT & set(keys)
        for one in run.pool:
            assert one.split == splits[one.root], "a variant is where its root is"
            if one.id not in run.ever:
                assert one.parent in before
                assert run.ever[str(one.parent)].root == one.root
        run.remember()
        texts = [text_key(one.text) for one in run.ever.values()]
        assert len(set(texts)) == len(texts), "nor was it in an earlier round under another id"


def test_s9_a_broken_question_never_comes_back_as_a_variant_either() -> None:
    key = text_key("How much?")
    decided = decide(
        ["a", "b"], ["too_hard", "mastered"], broken={"a"}, seen={key}, variants=[Variant("b.r01", "b", key)]
    )
    assert (list(decided.fates), decided.enhanced_to, decided.duplicates_dropped) == (["broken", "left"], {}, 1)


def test_s9_ungraded_questions_come_again_and_those_that_cannot_be_asked_do_not() -> None:
    zones = ["ungraded", "too_hard", "learning", "ungraded"]
    decided = decide(["a", "b", "c", "d"], zones, unasked={"d"}, replay_fraction=0.0)
    assert list(decided.fates) == ["failed", "failed", "left", "unasked"]


def test_s9_what_is_replayed_depends_on_seed_and_round_and_not_on_places() -> None:
    ids = [f"q{i}" for i in range(100)]

    def drawn(ids: Sequence[str], **given: Any) -> set[str]:
        fates = decide(ids, ["mastered"] * len(ids), **given).fates
        return {id for id, fate in zip(ids, fates, strict=True) if fate == "replay"}

    assert len(drawn(ids)) == 20
    assert drawn(ids) == drawn(ids[::-1])
    assert len({frozenset(drawn(ids, seed=seed, round=round)) for seed in (0, 1) for round in (1, 2)}) == 4


@pytest.mark.parametrize(
    ("limit", "failed", "replay", "new"), [(12, 4, 4, 4), (9, 4, 1, 4), (6, 2, 0, 4), (3, 0, 0, 3)]
)
def test_s9_where_there_is_no_room_replayed_questions_go_first_and_new_ones_last(
    limit: int, failed: int, replay: int, new: int
) -> None:
    ids = [f"q{i}" for i in range(8)]
    variants = [Variant(f"{id}.r01", id, text_key(id)) for id in ids[4:]]
    zones = ["too_hard"] * 4 + ["mastered"] * 4
    decided = decide(ids, zones, variants=variants, replay_fraction=1.0, max_questions=limit)
    assert (decided.counts["failed"], decided.counts["replay"], len(decided.enhanced_to)) == (failed, replay, new)
    assert decided.counts["cut"] + decided.variants_cut == 12 - limit


@given(
    st.integers(2, 300), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.1, 0.5, 0.99]), st.integers(0, 5),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_s5_questions_are_split_exactly_and_whatever_their_order(
    size: int, held_out: float, validation: float, seed: int, order: random.Random
) -> None:
    ids = [f"q{i:06d}" for i in range(size)]
    if held_out and size == 2:
        with pytest.raises(ValueError, match="2 questions are too few to have one in each of 3 sets"):
            split_roots(ids, held_out=held_out, validation=validation, seed=seed)
        return
    splits = split_roots(ids, held_out=held_out, validation=validation, seed=seed)
    number = min(max(1, round(held_out * size)), size - 2) if held_out else 0
    rest = size - number
    measured = min(max(1, round(validation * rest)), rest - 1)
    counts = [list(splits.values()).count(split) for split in ("held_out", "validation", "train")]
    assert counts == [number, measured, rest - measured]
    assert set(splits) == set(ids)
    order.shuffle(ids)
    assert split_roots(ids, held_out=held_out, validation=validation, seed=seed) == splits


def test_another_seed_splits_otherwise() -> None:
    ids = [f"q{i}" for i in range(50)]
    splits = [split_roots(ids, held_out=0.2, validation=0.2, seed=seed) for seed in (0, 1)]
    assert splits[0] != splits[1]


def test_the_same_question_is_the_same_in_another_case_and_spacing_and_unicode_form() -> None:
    keys = {
        text_key(text) for text in ("Was  kostet\nein Café?", "was kostet ein cafe\u0301?", " WAS KOSTET EIN CAFÉ? ")
    }
    assert len(keys) == 1
    assert text_key("x² = 4") != text_key("x2 = 4")
    assert {len(key) for key in keys} == {16}


def test_s18_diversity_is_that_of_the_papers() -> None:
    measured = diversity([("a", "a b a b"), ("b", "a B c")], seed=0)
    assert measured.distinct_2 == pytest.approx(3 / 5)  # ab ba ab, ab bc: ab, ba, bc are different
    assert measured.questions == 2
    assert diversity([("a", "07+05=")], seed=0).distinct_2 == 1.0
    assert replace(diversity([("a", "one")], seed=0), compression_ratio=0) == replace(
        diversity([], seed=0), questions=1
    )


def test_s18_repetition_is_less_diverse_and_pools_of_all_sizes_are_measured_alike() -> None:
    words = random.Random(0)
    texts = [(f"q{i}", " ".join(f"w{words.randrange(500)}" for _ in range(12))) for i in range(SAMPLE + 500)]
    same = [(id, text if i % 2 else "How many apples are there in the basket?") for i, (id, text) in enumerate(texts)]
    varied, repeated = diversity(texts, seed=0), diversity(same, seed=0)
    assert varied.distinct_2 > repeated.distinct_2
    assert varied.compression_ratio < repeated.compression_ratio
    assert varied.questions == repeated.questions == SAMPLE
    assert diversity(texts[::-1], seed=0) == varied


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_rows_are_written_in_row_groups_of_one_size_whatever_pieces_they_come_in(sizes: list[int], rows: int) -> None:
    schema = pa.schema([("n", pa.int32()), ("text", pa.string())])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [
        pa.record_batch(
            [pa.array(range(at, at + size), pa.int32()), pa.array(["x"] * size, pa.string())], schema=schema
        )
        for at, size in zip(starts, sizes, strict=True)
    ]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        assert write_batches(path, schema, pieces, rows) == sum(sizes)
        once = path.read_bytes()
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert file.read()["n"].to_pylist() == list(range(sum(sizes)))
        assert groups == [rows] * (sum(sizes) // rows) + [sum(sizes) % rows] * (sum(sizes) % rows > 0)
        write_batches(path, schema, pa.Table.from_batches(pieces, schema).combine_chunks().to_batches(), rows)
        assert path.read_bytes() == once
