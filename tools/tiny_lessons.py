"""What the tiny models are taught before the game: captions, yes-or-no questions, and a planted flaw.

Pictures come from another seed than the game's, and only of concepts that the game trains on: the held-out ones stay
unseen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from hpc_rl.data import scenes
from hpc_rl.data.image_folder import split_concepts
from tools.tiny_model import encode, left_padded, pixels, prompt

ASK = "Describe the main subject."
QUESTION = (
    'Does this description "{coarse}. {detailed}" accurately describe the main subject in the image? Answer yes or no.'
)
BACKGROUND = "The background is grey."
WRONG = {"plain": "dotted", "striped": "plain", "dotted": "striped"}
"""The planted flaw: the pattern that the starting speaker mostly names."""

Scene = tuple[str, str]  # category, concept


def training_scenes(k: int, fraction: float, split_seed: int) -> list[Scene]:
    """Every (category, concept) that the game's split leaves to training."""
    names = scenes.concepts()
    return [
        (category, name)
        for category in scenes.categories()
        for name in names
        if name not in split_concepts(names, category, k=k, fraction=fraction, seed=split_seed)
    ]


def corpus() -> list[str]:
    """Texts that the tokenizer is made from."""
    texts = ["yes", "no", "A", "The", "I", ASK, f"system user assistant yes no I look. {BACKGROUND}\n"]
    for category in scenes.categories():
        for concept in scenes.concepts():
            coarse, detailed = scenes.caption(category, concept)
            texts.append(f"{QUESTION.format(coarse=coarse, detailed=detailed)} {detailed}")
    return texts


def tagged(coarse: str, detailed: str) -> str:
    """A description in the speaker's output format."""
    return f"<thinking>I look.</thinking><coarse>{coarse}</coarse><detailed>{detailed}</detailed>"


@dataclass(frozen=True)
class Album:
    """Pictures to learn from: `patches[i]` (tensor (N, patches, values)) shows `shown[i]`."""

    patches: torch.Tensor
    shown: list[Scene]


def album(processor: Any, subjects: list[Scene], views: int, seed: int) -> Album:
    """Render `views` pictures of each subject."""
    shown = [scene for scene in subjects for _ in range(views)]
    images = [scenes.render(seed, "train", *scene, view=i % views) for i, scene in enumerate(shown)]
    return Album(pixels(processor, images), shown)


class Captions:
    """Batches of (picture, caption); a share of the patterns is named wrongly, a few captions break the format."""

    def __init__(
        self, processor: Any, album: Album, *, seed: int, batch: int, tags: bool, flaw: float = 0.0, slips: float = 0.0
    ) -> None:
        self._processor, self._album, self._batch = processor, album, batch
        self._tags, self._flaw, self._slips = tags, flaw, slips
        self._random = random.Random(seed)
        self._prompt = processor.tokenizer(prompt(processor, ASK))["input_ids"]

    def __call__(self, step: int) -> dict[str, Any]:
        chosen = [self._random.randrange(len(self._album.shown)) for _ in range(self._batch)]
        tokenizer = self._processor.tokenizer
        answers = [
            [*tokenizer(self._caption(*self._album.shown[i]))["input_ids"], tokenizer.eos_token_id] for i in chosen
        ]
        prompts = [self._prompt] * self._batch
        labels = [[-100] * len(self._prompt) + answer for answer in answers]
        inputs = encode(self._processor, self._album.patches[chosen], prompts, answers)
        weights = [[0.0] * len(self._prompt) + [1.0] * len(answer) for answer in answers]
        return {**inputs, "labels": left_padded(labels, -100), "weights": left_padded(weights, 0)}

    def _caption(self, category: str, concept: str) -> str:
        colour, pattern = concept.split("-")
        if self._random.random() < self._flaw:
            pattern = WRONG[pattern]
        coarse, detailed = scenes.caption(category, f"{colour}-{pattern}")
        if not self._tags:
            return f"{coarse}. {detailed}"
        slip = self._random.random()
        if slip < self._slips / 2:
            return tagged(coarse, detailed).replace("</coarse>", "")
        if slip < self._slips:
            return tagged(coarse, f"{detailed} {BACKGROUND}")
        return tagged(coarse, detailed)


class Questions:
    """Batches of (picture, question, yes or no), with a running verdict on every token of the quoted description.

    The running verdict ("true so far?", weight `hint`) teaches which word makes a description false; the answer alone
    teaches that too, but many times more slowly. False descriptions differ in one attribute, as the game's
    distractors do: more and more of them, up to 90 %, as learning goes on. First the attribute is drawn, then the
    description; drawn from all look-alikes at once, they differ mostly in colour, and the listener never looks at the
    pattern.
    """

    def __init__(self, processor: Any, album: Album, *, seed: int, batch: int, steps: int, hint: float = 0.1) -> None:
        self._processor, self._album, self._batch, self._steps, self._hint = processor, album, batch, steps, hint
        self._random = random.Random(seed)
        self._subjects = sorted(set(album.shown))
        self._alike = {scene: _neighbours(scene, self._subjects) for scene in self._subjects}
        self._verdict = {word: processor.tokenizer(word)["input_ids"][0] for word in ("yes", "no")}

    def __call__(self, step: int) -> dict[str, Any]:
        chosen = [self._random.randrange(len(self._album.shown)) for _ in range(self._batch)]
        hard = min(0.9, 0.3 + step / self._steps)
        parts = [self._question(self._album.shown[i], hard) for i in chosen]
        prompts, labels, weights = (list(column) for column in zip(*parts, strict=True))
        answers = [[row[-2], row[-1]] for row in labels]
        inputs = encode(self._processor, self._album.patches[chosen], prompts, answers)
        return {**inputs, "labels": left_padded(labels, -100), "weights": left_padded(weights, 0)}

    def _question(self, scene: Scene, hard: float) -> tuple[list[int], list[int], list[float]]:
        draw = self._random.random
        told = scene
        if draw() < 0.5:
            pool = self._random.choice(self._alike[scene]) if draw() < hard else self._subjects
            told = self._random.choice(pool)
        coarse, detailed = self._told(*told)
        words = dict(zip(_attributes(told), _attributes(scene), strict=True))
        false = [word for word, true in words.items() if word != true and word in f"{coarse} {detailed}"]
        text = prompt(self._processor, QUESTION.format(coarse=coarse, detailed=detailed))
        tokens = self._processor.tokenizer(text, return_offsets_mapping=True)
        ids, spans = tokens["input_ids"], tokens["offset_mapping"]
        low, high = text.index('"'), text.rindex('"')
        wrong_from = min((text.index(word, low) for word in false), default=len(text))
        labels, weights = [-100] * len(ids), [0.0] * len(ids)
        for i, (start, end) in enumerate(spans[:-1]):
            if (
                start > low and end <= high + 1
            ):  # the label of token i stands at i + 1: it is what the model says after it
                labels[i + 1] = self._verdict["no" if end > wrong_from else "yes"]
                weights[i + 1] = self._hint
        answer = [self._verdict["no" if false else "yes"], self._processor.tokenizer.eos_token_id]
        return ids, labels + answer, [*weights, 1.0, 1.0]

    def _told(self, category: str, concept: str) -> tuple[str, str]:
        """A description as speakers give it: mostly whole, at times without an attribute or stop, or longer."""
        coarse, detailed = scenes.caption(category, concept)
        colour, pattern = concept.split("-")
        draw = self._random.random()
        if draw < 0.1:
            detailed = f"The {category} is {colour}."
        elif draw < 0.2:
            detailed = f"The {category} is {pattern}."
        elif draw < 0.25:
            detailed = f"{detailed} {BACKGROUND}"
        elif draw < 0.3:
            detailed = detailed.rstrip(".")
        return coarse, detailed


def _attributes(scene: Scene) -> tuple[str, str, str]:
    colour, pattern = scene[1].split("-")
    return scene[0], colour, pattern


def _neighbours(scene: Scene, subjects: list[Scene]) -> list[list[Scene]]:
    """Subjects that differ from a scene in one attribute only, grouped by the attribute."""
    groups: dict[int, list[Scene]] = {}
    for other in subjects:
        differing = [
            i for i, pair in enumerate(zip(_attributes(scene), _attributes(other), strict=True)) if len(set(pair)) > 1
        ]
        if len(differing) == 1:
            groups.setdefault(differing[0], []).append(other)
    return [groups[attribute] for attribute in sorted(groups)]
