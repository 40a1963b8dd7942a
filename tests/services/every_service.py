"""Every service around a tiny or a plain model, really served: what they share is tested on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from hpc_rl.config.services import (
    ListenerServiceConfig,
    RewardModelServiceConfig,
    SpeakerServiceConfig,
    TeacherServiceConfig,
)
from hpc_rl.engines.base import Completion, Request, Sampling
from hpc_rl.engines.yes_no import YesNoModel
from hpc_rl.services import handoff, listener, reward_model, speaker, teacher
from hpc_rl.services.address import Address
from hpc_rl.services.frame import Desk, Service
from hpc_rl.services.hosting import Hosted, host
from hpc_rl.services.images import ImageRoots
from hpc_rl.services.pair_scorer import PairScorer
from tests.engines.answering import Answering
from tests.waiting import PATIENCE_S


class Letters:
    """A model that scores a solution by its length."""

    def encode(self, question: str, solution: str) -> list[int]:
        if not solution:
            raise ValueError("nothing to score")
        return list(solution.encode())

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        return [float(len(row)) for row in rows]


class Colors(Answering):
    """A speaker that names the color of an image's first pixel."""

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        first_pixel: Any = request.prompt.open_images()[0].getpixel((0, 0))
        color = {(254, 0, 0): "red", (0, 0, 254): "blue"}[first_pixel]
        return Completion((), (), (), f"<coarse>{color}</coarse>", "stop")


def open_listener(model: YesNoModel, root: Path, limits: dict[str, Any]) -> Service:
    options = ListenerServiceConfig(**limits)
    return listener.service_of(PairScorer(model, ImageRoots([root], options)), options, "abc")


def open_speaker(model: YesNoModel, root: Path, limits: dict[str, Any]) -> Service:
    options = SpeakerServiceConfig(**limits)
    describer = speaker.Describer(
        Colors(), ImageRoots([root], options), problem="?", sampling=Sampling(0, 8), seed_of=len
    )
    desk: speaker.SpeakerDesk = Desk(describer, options)
    return Service("speaker", speaker.create_app(desk), desk.batcher, "abc")


def open_reward_model(model: YesNoModel, root: Path, limits: dict[str, Any]) -> Service:
    return reward_model.service_of("reward_model", Letters(), RewardModelServiceConfig(**limits), "abc", {})


class Echo(Answering):
    """A chat model that repeats the last message, letter by letter."""

    max_tokens = 200

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(len(message["content"]) for message in messages)

    def answer(self, request: Request, sampling: Sampling) -> Completion:
        text: str = request.prompt.messages[-1]["content"]
        said = text[: sampling.max_tokens]
        return Completion((0,) * len(text), (0,) * len(said), (), said, "stop" if said == text else "length")


def open_teacher(model: YesNoModel, root: Path, limits: dict[str, Any]) -> Service:
    echo = Echo()
    options = TeacherServiceConfig(model="/models/judge-8b", **limits)
    return teacher.service_of("teacher", options, teacher.Writer(echo, echo, 20), "abc", {})


SERVICES: dict[str, Callable[[YesNoModel, Path, dict[str, Any]], Service]] = {
    "listener": open_listener,
    "speaker": open_speaker,
    "reward_model": open_reward_model,
    "teacher": open_teacher,
}


@dataclass
class Served:
    """A server, and a request that it answers well."""

    name: str
    hosted: Hosted
    token: str
    root: Path
    http: httpx.Client

    @property
    def port(self) -> int:
        return self.hosted.publication.endpoint.port

    @property
    def known(self) -> dict[str, str]:
        """Headers of those who have the token."""
        return {"Authorization": f"Bearer {self.token}"}

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """With the token, unless other headers are given."""
        return self.http.request(method, path, **{"headers": self.known, **more})

    @property
    def good(self) -> tuple[str, dict[str, Any]]:
        """Route and body."""
        return {
            "listener": ("/score", {"candidate_paths": ["img1.jpg", "img2.jpg"], "question": "red?"}),
            "speaker": ("/describe", {"image_path": "img2.jpg"}),
            "reward_model": ("/score", {"question": "1 + 1", "solutions": ["2"]}),
            "teacher": (
                "/v1/chat/completions",
                {"model": "judge-8b", "messages": [{"role": "user", "content": "yes"}]},
            ),
        }[self.name]

    def is_well(self) -> bool:
        """Whether it lives, is ready, and answers a good request, and well."""
        route, body = self.good
        answers = [self.ask("GET", "/health"), self.ask("GET", "/ready"), self.ask("POST", route, json=body)]
        assert [answer.status_code for answer in answers] == [200, 200, 200], [answer.text for answer in answers]
        said = answers[-1].json()
        return {
            "listener": lambda: len(said["yes_probabilities"]) == 2,
            "speaker": lambda: said["coarse"] == "blue",
            "reward_model": lambda: said["scores"] == [1.0],
            "teacher": lambda: said["choices"][0]["message"]["content"] == "yes",
        }[self.name]()


@contextmanager
def serve(name: str, model: YesNoModel, folder: Path, **limits: Any) -> Iterator[Served]:
    """Serve one of them, with two images, `img1.jpg` and `img2.jpg`."""
    root = folder / "images"
    root.mkdir()
    for number, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (56, 56), color).save(root / f"img{number}.jpg")
    hosted = host(
        SERVICES[name](model, root, limits),
        folder=folder / "services" / name,
        address=Address("127.0.0.1", "127.0.0.1"),
        options=ListenerServiceConfig(**limits),
        environ={},
    )
    try:
        with httpx.Client(base_url=hosted.publication.endpoint.url, trust_env=False, timeout=PATIENCE_S) as http:
            yield Served(name, hosted, handoff.read_token(folder / "services" / name), root, http)
    finally:
        hosted.leave(0.0)
