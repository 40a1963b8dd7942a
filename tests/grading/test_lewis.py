"""Grading in the Lewis game: hand-computed tables, and what holds for every text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_rl.grading.lewis import (
    TAGS,
    UNDECIDED,
    Description,
    Reward,
    Weights,
    accuracy_reward,
    count_sentences,
    decide,
    format_reward,
    is_well_formed,
    length_reward,
    parse,
    question,
)

GOOD = "<thinking>I look.</thinking><coarse>A photo of a ring</coarse><detailed>The ring is red and plain.</detailed>"
L3 = 'Does this description "{coarse}. {detailed}" accurately describe the main subject in the image? Answer yes or no.'
NAN = math.nan


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1.0),
        (GOOD.replace("</thinking><coarse>", "</thinking>\n\n<coarse>"), 1.0),
        ("<thinking></thinking><coarse></coarse><detailed></detailed>", 1.0),
        ("So: " + GOOD + " Done.", 1.0),
        (GOOD.replace("</coarse>", ""), 0.0),
        (GOOD.replace("<thinking>I look.</thinking>", ""), 0.0),
        (GOOD + GOOD, 0.0),
        (GOOD.replace("I look.", "I write <coarse> next."), 0.0),
        ("<coarse>A</coarse><thinking>B</thinking><detailed>C.</detailed>", 0.0),
        ("<thinking><coarse></thinking></coarse><detailed></detailed>", 0.0),
        (GOOD.replace("coarse", "Coarse"), 0.0),
        (GOOD.replace("<detailed>", "< detailed >"), 0.0),
        ("", 0.0),
    ],
)
def test_the_format_reward_wants_each_tag_once_closed_and_in_order(text: str, reward: float) -> None:
    assert format_reward(text) == reward


@pytest.mark.parametrize(
    ("text", "coarse", "detailed"),
    [
        (GOOD, "A photo of a ring", "The ring is red and plain."),
        (GOOD.replace("</coarse>", ""), "A photo of a ring", "The ring is red and plain."),
        (GOOD.removesuffix("</detailed>"), "A photo of a ring", "The ring is red and plain."),
        (
            GOOD.replace("coarse", "COARSE").replace("<detailed>", "< detailed >"),
            "A photo of a ring",
            "The ring is red and plain.",
        ),
        ("<coarse>A dog</coarse>", "A dog", ""),
        ("<detailed>It is brown.</detailed>", "", "It is brown."),
        ("<coarse>A cat</coarse><coarse>A dog</coarse><coarse></coarse>", "A dog", ""),
        ("A brown dog.", "", "A brown dog."),
        ("<thinking>Hm.</thinking>A brown dog.", "", "A brown dog."),
    ],
)
def test_a_description_is_found_in_malformed_text_too(text: str, coarse: str, detailed: str) -> None:
    assert parse(text) == Description(coarse, detailed)


@pytest.mark.parametrize(
    "text",
    ["", "  \n", "<thinking>Only this.</thinking>", "<thinking>cut off", "<coarse></coarse><detailed> </detailed>"],
)
def test_text_that_says_nothing_about_the_image_has_no_description(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("coarse", "detailed", "quoted"),
    [
        ("A photo of a dog", "It is brown.", "A photo of a dog. It is brown."),
        ("A photo of a dog.", "It is brown.", "A photo of a dog. It is brown."),
        ("", "It is brown.", "It is brown."),
        ("A dog", "", "A dog"),
        ("{detailed}", "{coarse} %s \\1", "{detailed}. {coarse} %s \\1"),
    ],
)
def test_the_question_quotes_the_description(coarse: str, detailed: str, quoted: str) -> None:
    assert question(L3, Description(coarse, detailed)) == L3.replace("{coarse}. {detailed}", quoted)


def test_a_question_may_use_the_parts_apart_or_not_at_all() -> None:
    assert question("{detailed} / {coarse} {x}", Description("A", "B")) == "B / A {x}"
    assert question("Is it a dog?", Description("A", "B")) == "Is it a dog?"


@pytest.mark.parametrize(
    ("detailed", "reward"),
    [
        ("The dog is brown.", 0.1),
        ("The dog is brown", 0.1),
        ("What a dog!", 0.1),
        ("It is 3.5 cm long, i.e. small.", 0.1),
        ("It looks like Dr. Who with J. Smith's hat...", 0.1),
        ('It says "Hello."', 0.1),
        ("Brown, white, etc. in spots.", 0.1),
        ("The dog is brown. The background is grey.", 0.0),
        ("The dog is brown! It barks?", 0.0),
        ("It has spots, etc. The rest is white.", 0.0),
        ("The dog is brown. It", 0.0),
        ("这是一只狗。", 0.1),
        ("这是一只狗。它是棕色的。", 0.0),
        ("", 0.0),
        ("...", 0.0),
    ],
)
def test_the_length_reward_wants_one_sentence(detailed: str, reward: float) -> None:
    assert length_reward(f"<detailed>{detailed}</detailed>") == reward


def test_the_length_reward_wants_the_detailed_part_once_and_closed() -> None:
    assert length_reward("<detailed>A dog.") == 0.0
    assert length_reward("A dog.") == 0.0
    assert length_reward("<detailed>A dog.</detailed><detailed>A cat.</detailed>") == 0.0


@pytest.mark.parametrize(
    ("probabilities", "index"),
    [
        ([0.1, 0.9, 0.2], 1),
        ([0.9], 0),
        ([0.9, 0.9, 0.2], UNDECIDED),
        ([0.2, 0.9, 0.2], 1),
        ([NAN, 0.9], UNDECIDED),
        ([0.9, NAN], UNDECIDED),
        ([0.0, 0.0], UNDECIDED),
        ([], UNDECIDED),
    ],
)
def test_ties_and_nan_pick_nobody(probabilities: list[float], index: int) -> None:
    assert decide(probabilities) == index


@pytest.mark.parametrize(
    ("probabilities", "predicted", "label", "argmax", "soft"),
    [
        ([0.6, 0.2, 0.2], 0, 0, 1.0, 0.6),
        ([0.8, 0.8, 0.9], 2, 2, 1.0, 0.36),
        ([0.2, 0.1, 0.1], 0, 0, 1.0, 0.25),  # 0.5, halved: no P(yes) reaches 0.3
        ([0.3, 0.3, 0.0], UNDECIDED, 0, 0.0, 0.0),
        ([0.6, 0.2, 0.2], 0, 1, 0.0, 0.0),
        ([NAN, 0.2, 0.2], UNDECIDED, 0, 0.0, 0.0),
    ],
)
def test_accuracy_by_hand(probabilities: list[float], predicted: int, label: int, argmax: float, soft: float) -> None:
    assert accuracy_reward(probabilities, predicted, label, "argmax") == argmax
    assert accuracy_reward(probabilities, predicted, label, "soft_gated") == pytest.approx(soft)


def test_the_total_is_the_weighted_sum() -> None:
    assert Reward(1.0, 1.0, 0.1).total(Weights()) == pytest.approx(2.1)
    assert Reward(0.5, 0.0, 0.1).total(Weights(2.0, 7.0, 3.0)) == pytest.approx(1.3)


_pieces = st.one_of(
    st.text(max_size=12), st.sampled_from([f"<{'/' * close}{tag}>" for tag in TAGS for close in (0, 1)])
)
_texts = st.lists(_pieces, max_size=12).map("".join)


@given(_texts)
def test_any_text_is_graded(text: str) -> None:
    assert format_reward(text) in (0.0, 1.0)
    assert length_reward(text) in (0.0, 0.1)
    assert count_sentences(text) >= 0
    description = parse(text)
    assert description is None or description.coarse or description.detailed


@given(st.tuples(*[st.text(st.characters(exclude_characters="<>"), max_size=30)] * 3), st.sampled_from(["", "\n", " "]))
def test_what_is_written_in_the_format_is_read_back(parts: tuple[str, str, str], between: str) -> None:
    text = between.join(f"<{tag}>{part}</{tag}>" for tag, part in zip(TAGS, parts, strict=True))
    assert is_well_formed(text)
    coarse, detailed = parts[1].strip(), parts[2].strip()
    if coarse or detailed:
        assert parse(text) == Description(coarse, detailed)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 5))
def test_the_soft_reward_lies_between_0_and_the_hard_one(probabilities: list[float], label: int) -> None:
    predicted = decide(probabilities)
    soft = accuracy_reward(probabilities, predicted, label, "soft_gated")
    assert 0.0 <= soft <= accuracy_reward(probabilities, predicted, label, "argmax") <= 1.0


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True), st.randoms())
def test_the_decision_follows_the_candidates_when_they_are_shuffled(probabilities: list[float], rng) -> None:
    order = list(range(len(probabilities)))
    rng.shuffle(order)
    assert order[decide([probabilities[i] for i in order])] == decide(probabilities)
