"""Images over HTTP: what must not be opened or decoded is an error of its item, and no more."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.engines.yes_no import YesNoModel

from .every_service import Served, serve
from .test_image_decoding import png, webp, zeros

LIMITS: dict[str, Any] = {"max_image_pixels": 1_000_000, "max_image_bytes": 100_000}


@pytest.fixture(scope="module", params=["listener", "speaker"])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, model: YesNoModel) -> Iterator[Served]:
    with serve(request.param, model, tmp_path_factory.mktemp(request.param), **LIMITS) as made:
        yield made


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(autouse=True)
def as_well_as_before(served: Served) -> Iterator[None]:
    yield
    assert served.is_well()


def item(served: Served, *, path: str | None = None, image: bytes | str | None = None) -> dict[str, Any]:
    """A request for one image, by path or in base64."""
    sent = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    if served.name == "speaker":
        return {"image_path": path} if path is not None else {"image": sent}
    named = {"candidate_paths": [path]} if path is not None else {"candidate_images": [sent]}
    return {**named, "question": "red?"}


def ask(served: Served, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    route = {"listener": "/batch_score", "speaker": "/batch_describe"}[served.name]
    answer = served.ask("POST", route, json={"batch": items})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


@pytest.fixture
def attacks(served: Served, tmp_path: Path) -> Iterator[list[str]]:
    """Paths that lead elsewhere, to what is no image, or to one that costs too much."""
    secret, planted = tmp_path / "secret.jpg", served.root / "planted"
    secret.write_bytes((served.root / "img1.jpg").read_bytes())
    planted.mkdir(exist_ok=True)
    (planted / "link.jpg").symlink_to(secret)
    (planted / "folder").symlink_to(tmp_path)
    os.mkfifo(planted / "fifo.jpg")
    (planted / "bomb.png").write_bytes(png(5_000, 5_000, zeros(25 << 20)))
    (planted / "bomb.webp").write_bytes(webp(13_000, 13_000))
    (planted / "large.png").write_bytes(bytes(100_001))
    (planted / "text.png").write_text("no image")
    with secret.open("rb") as open_secret:
        descriptor = f"/proc/self/fd/{open_secret.fileno()}"
        elsewhere = [descriptor, "/proc/self/environ", "/etc/passwd", "/dev/zero", str(secret), "../secret.jpg"]
        elsewhere += [f"{served.root}/../secret.jpg", f"{served.root}x/img1.jpg", "http://127.0.0.1/img1.jpg", "a\0b"]
        yield [*elsewhere, "planted", *(f"planted/{name}" for name in sorted(os.listdir(planted)) if name != "folder")]
    for path in planted.iterdir():
        path.unlink()


def test_no_path_leads_elsewhere_and_each_failure_is_that_of_its_item(served: Served, attacks: list[str]) -> None:
    bad, good = [item(served, path=path) for path in attacks], item(served, path="img2.jpg")
    results = ask(served, [good, *bad, good])
    assert "error" not in results[0] and results[0] == results[-1]
    for path, result in zip(attacks, results[1:-1], strict=True):
        assert list(result) == ["error"], path
        assert path.strip("/") not in result["error"] and str(served.root) not in result["error"]
    route = served.good[0]
    for body in bad:
        answer = served.ask("POST", route, json=body)
        assert answer.status_code == 422 and "detail" in answer.json()


def test_nobody_can_tell_what_there_is_outside_of_the_roots(served: Served, tmp_path: Path) -> None:
    (tmp_path / "there.jpg").write_bytes((served.root / "img1.jpg").read_bytes())
    (served.root / "link").unlink(missing_ok=True)
    (served.root / "link").symlink_to(tmp_path)
    for prefix in (str(tmp_path), "../..", "link"):
        there, not_there = ask(served, [item(served, path=f"{prefix}/{name}.jpg") for name in ("there", "not_there")])
        assert there == not_there and list(there) == ["error"]
    (served.root / "link").unlink()


def test_an_image_that_comes_along_is_answered_like_one_by_its_path(served: Served) -> None:
    for name in ("img1.jpg", "img2.jpg"):
        by_path, absolute, inline = ask(
            served,
            [
                item(served, path=name),
                item(served, path=str(served.root / name)),
                item(served, image=(served.root / name).read_bytes()),
            ],
        )
        assert by_path == absolute and "error" not in by_path
        if served.name == "speaker":
            assert inline == by_path
        else:
            assert inline["yes_probabilities"] == pytest.approx(by_path["yes_probabilities"], abs=1e-5)


def test_the_limits_hold_for_images_that_come_along(served: Served) -> None:
    bad = [png(5_000, 5_000, zeros(25 << 20)), webp(13_000, 13_000), bytes(100_001), b"GIF89a", "no base64", "AAAA"]
    good = item(served, image=(served.root / "img1.jpg").read_bytes())
    results = ask(served, [good, *(item(served, image=image) for image in bad), good])
    assert [list(result) for result in results[1:-1]] == [["error"]] * len(bad)
    assert "error" not in results[0] and results[0] == results[-1]


def test_exactly_one_of_the_two_forms_is_taken(served: Served) -> None:
    image = (served.root / "img1.jpg").read_bytes()
    both = {**item(served, path="img1.jpg"), **item(served, image=image)}
    neither = {key: value for key, value in both.items() if key == "question"}
    for body in (both, neither, {**item(served, path="img1.jpg"), **item(served, image="")}):
        assert served.ask("POST", served.good[0], json=body).status_code == 422


@pytest.mark.parametrize("served", ["listener"], indirect=True)  # only the listener keeps images
def test_the_listener_knows_an_image_that_came_along_when_it_comes_again(served: Served) -> None:
    body = item(served, image=(served.root / "img2.jpg").read_bytes())

    def kept() -> tuple[int, int]:
        caches = served.ask("GET", "/health").json()
        return caches["image_cache"]["hits"], caches["answer_cache"]["hits"]

    first = ask(served, [body])
    images, answers = kept()
    assert ask(served, [body]) == first
    assert kept() == (images, answers + 1)
    ask(served, [{**body, "question": "blue?"}])
    assert kept() == (images + 1, answers + 1)
