"""The listener over HTTP, with a real tiny model: answers, the seed's JSON, merging, and limits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.services.images import Identity
from hpc_rl.services.pair_scorer import AnswerCache
from tests.waiting import PATIENCE_S, wait_for

from .conftest import PIXELS, Lab

PATHS = [f"a/{number}.png" for number in range(6)]


def ask(lab: Lab, route: str, body: Any, **more: Any) -> httpx.Response:
    url = lab.hosted[-1].publication.endpoint.url
    headers = {"Authorization": f"Bearer {lab.token}"}
    return httpx.post(f"{url}{route}", json=body, headers=headers, trust_env=False, timeout=PATIENCE_S, **more)


def reference(model: YesNoModel, picture: Path, question: str) -> float:
    """P(yes) the plain way: one image, the processor's own prompt, a softmax over the whole vocabulary."""
    processor, network = model._processor, model._model
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        p = network(**inputs).logits[0, -1].double().softmax(-1)
    text = {i: processor.tokenizer.decode([i]).strip().lower() for i in range(len(processor.tokenizer))}
    yes, no = (sum(float(p[i]) for i in text if text[i] == word) for word in ("yes", "no"))
    return yes / (yes + no)


def test_scores_are_those_of_one_plain_forward_pass(lab: Lab) -> None:
    lab.serve()
    question = 'Does this description "A. B." describe the image? Answer yes or no.'
    answer = ask(lab, "/score", {"candidate_paths": PATHS, "question": question})
    assert answer.status_code == 200
    expected = [reference(lab.model, lab.pictures / path, question) for path in PATHS]
    assert answer.json() == {
        "yes_probabilities": pytest.approx(expected, abs=1e-5),
        "predicted_index": expected.index(max(expected)),
    }


def test_the_seeds_curl_example_works_to_the_letter(lab: Lab) -> None:
    url = lab.serve().publication.endpoint.url
    body = {
        "batch": [
            {
                "candidate_paths": [str(lab.pictures / "a/0.png"), str(lab.pictures / "a/1.png")],
                "question": "Does the description match the dog in the image?",
                "topk": 1,
            }
        ]
    }
    curl = ["curl", "-s", "--noproxy", "*", "-H", "Content-Type: application/json"]
    curl += ["-H", f"Authorization: Bearer {lab.token}", "-d", json.dumps(body), f"{url}/batch_score"]
    said = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
    assert list(said) == ["results", "took"] and said["took"] > 0
    (result,) = said["results"]
    assert list(result) == ["yes_probabilities", "predicted_index"]
    assert result["predicted_index"] == result["yes_probabilities"].index(max(result["yes_probabilities"]))
    health = subprocess.run(["curl", "-s", "--noproxy", "*", f"{url}/health"], capture_output=True, check=True).stdout
    assert json.loads(health)["status"] == "ok"


def test_results_come_in_the_order_of_the_batch(lab: Lab) -> None:
    lab.serve(batch_size=5)
    games = [{"candidate_paths": PATHS[i : i + 2], "question": f"red {i}?"} for i in range(4)]
    together = ask(lab, "/batch_score", {"batch": games}).json()["results"]
    alone = [ask(lab, "/score", game).json() for game in games]
    for one, other in zip(together, alone, strict=True):
        assert one["yes_probabilities"] == pytest.approx(other["yes_probabilities"], abs=1e-5)
        assert one["predicted_index"] == other["predicted_index"]


def test_a_bad_item_has_an_error_in_its_place_and_costs_the_others_nothing(lab: Lab) -> None:
    lab.serve()
    (lab.pictures / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    good = {"candidate_paths": PATHS[:2], "question": "red?"}
    bad = {"candidate_paths": ["a/0.png", "a/broken.png"], "question": "red?"}
    control = {"candidate_paths": ["a/0.png"], "question": "red <|image_pad|>?"}
    first, second, third, fourth = ask(lab, "/batch_score", {"batch": [good, bad, control, good]}).json()["results"]
    assert first == fourth and len(first["yes_probabilities"]) == 2
    assert list(second) == ["error"] and second["error"].startswith("candidate 1: ")
    assert "control token <|image_pad|>" in third["error"]
    alone = ask(lab, "/score", bad)
    assert alone.status_code == 422 and alone.json()["detail"] == second["error"]


def test_topk_adds_the_best_candidates_in_order(lab: Lab) -> None:
    lab.serve()
    said = ask(lab, "/score", {"candidate_paths": PATHS[:4], "question": "red?", "topk": 3}).json()
    p = said["yes_probabilities"]
    assert said["top_indices"] == sorted(range(4), key=lambda i: -p[i])[:3]
    assert said["predicted_index"] == said["top_indices"][0]


def test_the_same_picture_twice_is_a_tie_and_nobody_wins(lab: Lab) -> None:
    lab.serve()
    said = ask(lab, "/score", {"candidate_paths": ["a/0.png", "a/0.png"], "question": "red?"}).json()
    assert said["yes_probabilities"][0] == said["yes_probabilities"][1]
    assert said["predicted_index"] == -1


class NotANumber(YesNoModel):
    """A listener whose weights went wrong: some of its logits are NaN."""

    def yes_probabilities(self, pairs: Any) -> Any:
        scores = super().yes_probabilities(pairs)
        return [math.nan, *scores[1:]]


def test_a_probability_that_is_no_number_is_null_and_nobody_wins(lab: Lab, listener_folder: Path) -> None:
    lab.serve(model=NotANumber(str(listener_folder), **PIXELS))
    said = ask(lab, "/score", {"candidate_paths": PATHS[:2], "question": "red?", "topk": 2}).json()
    assert said["yes_probabilities"][0] is None and said["yes_probabilities"][1] > 0
    assert said["predicted_index"] == -1 and said["top_indices"] == [1, 0]


def test_an_image_is_encoded_once_for_all_questions_and_again_when_it_changes(lab: Lab) -> None:
    hosted = lab.serve()
    picture = lab.pictures / "a" / "changing.png"
    Image.new("RGB", (56, 56), (200, 0, 0)).save(picture)
    scores = []
    for question in ("red?", "blue?", "red? blue?"):
        scores.append(ask(lab, "/score", {"candidate_paths": ["a/changing.png"], "question": question}).json())
    details = health(lab, hosted.publication.endpoint.url)
    assert details["image_cache"] == {"hits": 2, "misses": 1}
    Image.new("RGB", (56, 56), (0, 0, 200)).save(picture)
    changed = ask(lab, "/score", {"candidate_paths": ["a/changing.png"], "question": "red?"}).json()
    assert changed != scores[0]


def health(lab: Lab, url: str) -> Any:
    headers = {"Authorization": f"Bearer {lab.token}"}
    return httpx.get(f"{url}/health", headers=headers, trust_env=False, timeout=PATIENCE_S).json()


class Counting(YesNoModel):
    """A listener that notes what it is asked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.encoded, self.asked = 0, 0

    def encode(self, pixels: Any) -> Any:
        self.encoded += len(pixels)
        return super().encode(pixels)

    def yes_probabilities(self, pairs: Any) -> Any:
        self.asked += len(pairs)
        return super().yes_probabilities(pairs)


def test_what_one_client_asked_is_answered_to_the_next_without_the_model(lab: Lab, listener_folder: Path) -> None:
    model = Counting(str(listener_folder), **PIXELS)
    hosted = lab.serve(model=model)
    game = {"candidate_paths": PATHS[:3], "question": "red?"}
    first = ask(lab, "/score", game).json()
    assert (model.encoded, model.asked) == (3, 3)
    assert ask(lab, "/score", game).json() == first  # to the bit
    assert (model.encoded, model.asked) == (3, 3)
    reordered = {"candidate_paths": [*PATHS[2::-1], PATHS[3]], "question": "red?"}
    said = ask(lab, "/score", reordered).json()["yes_probabilities"]
    assert said[:3] == first["yes_probabilities"][::-1]
    assert (model.encoded, model.asked) == (4, 4)  # only the fourth picture
    details = health(lab, hosted.publication.endpoint.url)
    assert details["answer_cache"] == {"hits": 6, "misses": 4, "kept": 4}


def test_an_answer_is_not_kept_for_a_path_that_may_not_be_read_any_more(lab: Lab) -> None:
    lab.serve()
    picture = lab.pictures / "a" / "leaving.png"
    Image.new("RGB", (56, 56), (200, 0, 0)).save(picture)
    game = {"candidate_paths": ["a/leaving.png"], "question": "red?"}
    assert ask(lab, "/score", game).status_code == 200
    picture.unlink()
    assert ask(lab, "/score", game).status_code == 422


def test_answers_are_bounded_and_what_is_no_number_is_asked_again() -> None:
    cache = AnswerCache(2)
    image, other = Identity((1, 2, 3, 4)), Identity((1, 2, 3, 5))
    for question, score in (("a", 0.1), ("b", 0.2)):
        assert cache.keep(image, question, score) == score
    assert cache.keep(image, "a", 0.100001) == 0.1 and cache.get(image, "a") == 0.1  # the first answer stays
    cache.keep(other, "a", 0.3)
    assert [cache.get(image, "a"), cache.get(image, "b"), cache.get(other, "a")] == [0.1, None, 0.3]
    assert math.isnan(cache.keep(image, "nan", math.nan)) and cache.get(image, "nan") is None
    assert len(cache) == 2


class Slow(YesNoModel):
    """A listener whose batches take as long as a test wants."""

    release = threading.Event()

    def yes_probabilities(self, pairs: Any) -> Any:
        self.release.wait(PATIENCE_S)
        return super().yes_probabilities(pairs)


@pytest.fixture
def slow(listener_folder: Path) -> Any:
    model = Slow(str(listener_folder), **PIXELS)
    model.release = threading.Event()
    yield model
    model.release.set()


def test_requests_of_different_clients_are_merged_into_one_model_batch(lab: Lab, slow: Slow) -> None:
    hosted = lab.serve(model=slow, batch_size=64)
    games = [{"candidate_paths": PATHS[:3], "question": f"red {i}?"} for i in range(9)]
    with ThreadPoolExecutor(9) as clients:
        answers = [clients.submit(ask, lab, "/score", games[0])]
        batcher = hosted.service.batcher
        wait_for(lambda: batcher.counters.requests == 1 and batcher.waiting == 0, "the first in the model")
        answers += [clients.submit(ask, lab, "/score", game) for game in games[1:]]
        wait_for(lambda: batcher.waiting == 24, "the others")
        slow.release.set()
        said = [answer.result().json() for answer in answers]
    assert hosted.service.batcher.counters.batches == 2 and hosted.service.batcher.counters.largest_batch == 24
    for game, answer in zip(games, said, strict=True):
        alone = ask(lab, "/score", game).json()
        assert answer["yes_probabilities"] == pytest.approx(alone["yes_probabilities"], abs=1e-5)


def test_games_that_are_not_as_documented_are_refused(lab: Lab) -> None:
    lab.serve(max_queue_items=20)
    game = {"candidate_paths": PATHS[:1], "question": "red?"}
    assert ask(lab, "/batch_score", {"batch": [game] * 11}).status_code == 413
    for body in ({}, {"batch": 3}, {"batch": [{"question": "x"}]}, {"batch": [{**game, "url": "http://x"}]}, []):
        assert ask(lab, "/batch_score", body).status_code == 422
    assert ask(lab, "/score", {**game, "candidate_paths": []}).status_code == 422
    assert ask(lab, "/batch_score", {"batch": []}).json()["results"] == []


def test_no_descriptor_is_left_open(lab: Lab) -> None:
    lab.serve()
    game = {"candidate_paths": [*PATHS, "a/none.png", "../x", "/etc/passwd"], "question": "red?"}
    ask(lab, "/batch_score", {"batch": [game]})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ask(lab, "/batch_score", {"batch": [game]})
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "the end of connections")
