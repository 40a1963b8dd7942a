"""An engine at work on what comes in: order, aborts, shared prompts, stops, refusals; here the transformers engine."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpc_rl.engines.base import Completion, Prompt, Request, Sampling, generate, generate_each
from hpc_rl.engines.in_flight import KEPT, InFlight
from hpc_rl.engines.stops import first_stop
from hpc_rl.engines.transformers_engine import TransformersEngine
from tests.waiting import wait_for
from tools.tiny_chat_model import POSITIONS, write

from .conftest import PIXELS, TEXT, by_path, requests, words_of

SAMPLING = Sampling(1.0, 12)
SHORT = Sampling(1.0, 4)


@pytest.fixture(scope="module")
def engine(speaker_folder: Path) -> TransformersEngine:
    return TransformersEngine(str(speaker_folder), max_model_len=128, max_num_seqs=4, **PIXELS)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "chat")


def run(engine: TransformersEngine) -> list[tuple[str, Completion]]:
    """Until nothing is left."""
    finished = []
    while engine.unfinished:
        finished += engine.step()
    return finished


def test_a_step_takes_those_that_have_waited_longest_and_gives_the_shortest_first(engine: TransformersEngine) -> None:
    asked = requests(samples=2)
    for place, request in enumerate(asked):
        engine.submit(str(place), request, SAMPLING)
    first = engine.step()
    assert {key for key, _ in first} == {"0", "1", "2", "3"} and engine.unfinished == 4
    lengths = [len(completion.token_ids) for _, completion in first]
    assert lengths == sorted(lengths)
    engine.submit("late", asked[0], SAMPLING)
    rest = run(engine)
    assert {key for key, _ in rest[:4]} == {"4", "5", "6", "7"} and rest[4][0] == "late"
    assert engine.step() == []
    made = dict(first + rest)
    for key, alone in zip(("0", "5", "late"), generate(engine, [asked[0], asked[5], asked[0]], SAMPLING), strict=True):
        assert made[key].token_ids == alone.token_ids


def test_requests_that_are_sampled_otherwise_wait_for_a_batch_of_their_own(engine: TransformersEngine) -> None:
    asked = requests(samples=1)
    for place, request in enumerate(asked):
        engine.submit(str(place), request, SHORT if place % 2 else SAMPLING)
    assert {key for key, _ in engine.step()} == {"0", "2"}
    made = dict(run(engine))
    assert set(made) == {"1", "3"} and max(len(one.token_ids) for one in made.values()) <= 4


def test_what_was_aborted_does_not_come_back_unless_asked_for_again(engine: TransformersEngine) -> None:
    asked = requests(samples=1)
    for place, request in enumerate(asked):
        engine.submit(str(place), request, SAMPLING)
    engine.abort(["1", "2", "nobody"])
    assert engine.unfinished == 2
    engine.submit("2", asked[2], SAMPLING)
    assert {key for key, _ in run(engine)} == {"0", "2", "3"}


def test_images_may_be_files_and_prompts_may_go_through_a_pipe(engine: TransformersEngine, tmp_path: Path) -> None:
    asked = requests(samples=2)
    files = by_path(asked, tmp_path)
    sent = pickle.dumps(files)
    assert len(sent) < 2000
    assert generate(engine, files, SAMPLING) == generate(engine, asked, SAMPLING)
    assert generate(engine, pickle.loads(sent), SAMPLING) == generate(engine, asked, SAMPLING)


def test_a_prompt_is_made_once_for_all_that_share_it_while_one_of_them_is_in_flight(tmp_path: Path) -> None:
    made: list[Prompt] = []

    def make(prompt: Prompt, images: Sequence[Image.Image]) -> int:
        assert len(images) == len(prompt.images)
        made.append(prompt)
        return len(made)

    shelf = InFlight(make)
    picture = requests()[0].prompt.open_images()[0]
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    picture.save(a)
    picture.save(b)
    of_files = [Prompt.of(TEXT, a), Prompt.of(TEXT, Path(str(a)))]
    others = [Prompt.of(TEXT, b), Prompt.of("?", a), Prompt.of(TEXT, picture), Prompt.of(TEXT)]
    others += [Prompt.of(TEXT, picture.copy()), Prompt(Prompt.of(TEXT).messages, keep_tokens=3)]
    keys = [shelf.take(prompt)[0] for prompt in [*of_files, *others, others[2]]]
    assert len(made) == len(shelf) == 7
    for key in keys:
        shelf.give_back(key)
    assert len(shelf) == 0
    assert shelf.take(of_files[0])[1] == 8  # it was dropped, and is made anew


class Reading:
    """Reads prompts when it is let; says how many at once, and in which threads."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.read: list[str] = []
        self.most = self.now = 0
        self.threads: set[str] = set()
        self.takes_s = 0.0

    def __call__(self, prompt: Prompt, _: Sequence[Image.Image]) -> str:
        self.now += 1
        self.most = max(self.most, self.now)
        self.may_go_on.wait(60)
        time.sleep(self.takes_s)
        text: str = prompt.messages[0]["content"][-1]["text"]
        self.read.append(text)
        self.threads.add(threading.current_thread().name)
        self.now -= 1
        if text == "bad":
            raise ValueError("bad prompt")
        return text.upper()


def test_prompts_that_are_expected_are_read_beside_one_at_a_time_and_only_once() -> None:
    read = Reading()
    shelf = InFlight(read, worth_s=0.0)
    asked = [Prompt.of(text) for text in ("a", "b", "bad", "c")]
    assert shelf.expect(asked) == 0 and read.read == []
    read.may_go_on.set()
    wait_for(lambda: shelf.expect(asked) == 4, "all four are read")
    assert sorted(read.read) == sorted(["a", "b", "bad", "c"]) and read.most == 1
    assert threading.current_thread().name not in read.threads
    assert [shelf.take(prompt)[1] for prompt in (asked[0], asked[1], asked[3])] == ["A", "B", "C"]
    with pytest.raises(ValueError, match="bad prompt"):
        shelf.take(asked[2])
    assert len(read.read) == 4 and len(shelf) == 3
    shelf.close()


def test_a_prompt_that_is_still_being_read_is_waited_for_and_one_that_is_not_expected_any_more_is_forgotten() -> None:
    read = Reading()
    shelf = InFlight(read, worth_s=0.0)
    last = [Prompt.of(f"last {place}") for place in range(KEPT)]
    shelf.expect([Prompt.of("a"), Prompt.of("never"), *last])
    shelf.expect([Prompt.of("a")])
    threading.Timer(0.2, read.may_go_on.set).start()
    assert shelf.take(Prompt.of("a"))[1] == "A"
    assert shelf.expect([]) == 0
    assert shelf.take(Prompt.of("never"))[1] == "NEVER"
    wait_for(lambda: len(read.read) == 2 + KEPT, "the others are read")
    assert [shelf.take(prompt)[1] for prompt in last] == [f"LAST {place}" for place in range(KEPT)]
    assert sorted(read.read) == sorted(["a", "never", *(f"last {place}" for place in range(KEPT))])
    shelf.close()


def test_prompts_are_read_several_at_a_time_and_the_next_one_always() -> None:
    read = Reading()
    read.may_go_on.set()
    shelf = InFlight(read, worth_s=0.0)
    asked = [Prompt.of(f"{place}") for place in range(10)]
    wait_for(lambda: shelf.expect(asked[:8]) == 8, "the first eight are read")
    for place in range(4):
        shelf.take(asked[place])
    assert shelf.expect(asked[3:10]) == 5, "two of seven are new, which is too few to read them now"
    assert shelf.expect([asked[9], *asked[3:8]]) == 0, "the next one is read however few there are"
    wait_for(lambda: shelf.expect([asked[9], *asked[3:8]]) == 6, "it is read")
    assert "8" not in read.read
    wait_for(lambda: shelf.expect(asked[8:9]) == 1, "the rest is read")
    shelf.close()


def test_prompts_that_take_no_time_are_read_when_they_are_taken_until_they_take_long_again() -> None:
    read = Reading()
    read.may_go_on.set()
    shelf = InFlight(read, worth_s=0.4)  # far more than a busy machine takes to append to a list
    ours = threading.current_thread().name
    wait_for(lambda: shelf.expect([Prompt.of("first")]) == 1, "the first is read")
    assert ours not in read.threads
    asked = [Prompt.of(f"{place}") for place in range(8)]
    assert shelf.expect(asked) == 8 and read.read == ["first"]
    assert [shelf.take(prompt)[1] for prompt in asked] == [f"{place}" for place in range(8)] and ours in read.threads
    read.takes_s = 4.5  # a tenth of it counts
    shelf.take(Prompt.of("long"))
    read.takes_s = 0.0
    read.threads.clear()
    wait_for(lambda: shelf.expect([Prompt.of("next")]) == 1, "it is read beside")
    assert read.read[-1] == "next" and ours not in read.threads
    shelf.close()


def test_what_is_drawn_does_not_depend_on_what_was_expected(engine: TransformersEngine, tmp_path: Path) -> None:
    asked = by_path(requests(samples=2), tmp_path)
    alone = generate(engine, asked, SAMPLING)
    assert engine.expect([request.prompt for request in reversed(asked)]) == len(asked)
    assert generate(engine, asked, SAMPLING) == alone
    broken = Prompt.of(TEXT, tmp_path / "missing.png")
    engine.expect([broken, asked[0].prompt])
    with pytest.raises(ValueError, match=r"missing\.png"):
        engine.submit("a", Request(broken, 1), SAMPLING)
    assert generate(engine, asked, SAMPLING) == alone
    assert len(engine._prompts) == 0


def test_an_engine_that_is_done_keeps_no_prompts(engine: TransformersEngine) -> None:
    generate(engine, requests(), SHORT)
    engine.submit("a", requests()[0], SHORT)
    engine.abort(["a"])
    assert len(engine._prompts) == 0


def test_with_a_stop_a_completion_is_the_same_up_to_there(engine: TransformersEngine) -> None:
    asked = requests()
    whole = generate(engine, asked, SAMPLING)
    word = words_of(whole)[0]
    stops = ("never", word)
    for before, after in zip(whole, generate(engine, asked, Sampling(1.0, 12, stop=stops)), strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert after.logprobs == pytest.approx(before.logprobs[: len(after.token_ids)], abs=1e-5)
        if word in before.text:
            assert after.text == before.text[: before.text.index(word) + 2]
            assert after.finish_reason == "stop" and len(after.token_ids) < len(before.token_ids)
        else:
            assert (after.token_ids, after.finish_reason) == (before.token_ids, before.finish_reason)


@given(st.lists(st.text("ab", min_size=1, max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1))
def test_the_stop_that_is_complete_first_ends_a_text_however_it_came_in(pieces: list[str], stops: list[str]) -> None:
    whole, text, found = "".join(pieces), "", None
    for piece in pieces:
        text += piece
        if (found := first_stop(text, len(piece), stops)) is not None:
            break
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    assert found == min(ends, default=None)


def test_a_completion_ends_where_the_longest_input_does(engine: TransformersEngine, chat_folder: Path) -> None:
    (prompt,) = (completion.prompt_token_ids for completion in generate(engine, [requests()[0]], SHORT))
    tight = TransformersEngine(str(chat_folder), max_model_len=40)
    (made,) = generate(tight, [Request(Prompt.of("yes"), 1)], Sampling(0.0, 100))
    assert len(made.prompt_token_ids) + len(made.token_ids) == 40 and made.finish_reason == "length"
    assert len(prompt) < 128


def test_what_cannot_be_sampled_is_refused_when_it_is_submitted(
    engine: TransformersEngine, chat_folder: Path, tmp_path: Path
) -> None:
    good = requests()[0]
    long = Request(Prompt.of("word " * 200), 0)
    nothing = Request(Prompt.of(TEXT, tmp_path / "none.png"), 0)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; the engine takes 128, .* raise max_model_len"):
        generate(engine, [good, long], SHORT)
    with pytest.raises(ValueError, match=r"none\.png cannot be read"):
        generate(engine, [nothing], SHORT)
    with pytest.raises(ValueError, match="engine vllm does"):
        generate(engine, [good], Sampling(1.0, 4, json_schema="{}"))
    engine.submit("a", good, SHORT)
    with pytest.raises(ValueError, match="a is in flight already"):
        engine.submit("a", good, SHORT)
    engine.abort(["a"])
    assert engine.unfinished == 0 and len(engine._prompts) == 0
    blind = TransformersEngine(str(chat_folder))
    with pytest.raises(ValueError, match="sees no images"):
        generate(blind, [good], SHORT)
    with pytest.raises(ValueError, match=rf"the engine takes {POSITIONS}"):
        generate(blind, [Request(Prompt.of("x " * 600), 0)], SHORT)


def test_of_each_request_its_completion_or_why_there_is_none(engine: TransformersEngine) -> None:
    good, long = requests()[0], Request(Prompt.of("word " * 200), 0)
    first, second, third = generate_each(engine, [(good, SHORT), (long, SHORT), (good, SAMPLING)])
    assert isinstance(first, Completion) and isinstance(third, Completion)
    assert isinstance(second, ValueError) and "128" in str(second)
    assert first.token_ids == third.token_ids[:4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "0 is greedy"),
        ({"max_tokens": 0}, "at least one token"),
        ({"top_p": 0.0}, "above 0"),
        ({"stop": ("end", "")}, "a stop is empty"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"temperature": 1.0, "max_tokens": 4, **wrong})


def test_no_image_is_cut_in_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image is cut in two"):
        Prompt(Prompt.of(TEXT).messages, (tmp_path / "a.png",), keep_tokens=3)


def test_a_model_that_names_no_end_is_refused_with_the_way_out(chat_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_folder, tmp_path, dirs_exist_ok=True)
    for name, key in (("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        said = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**said, key: None}))
    with pytest.raises(ValueError, match=r"names no token that ends a completion.*set eos_token_id in its"):
        TransformersEngine(str(tmp_path))


def test_a_closed_engine_has_nothing_left(chat_folder: Path) -> None:
    engine = TransformersEngine(str(chat_folder))
    engine.submit("a", Request(Prompt.of("yes"), 0), SHORT)
    engine.close()
    assert engine.unfinished == 0 and engine.step() == []
