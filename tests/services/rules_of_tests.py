"""Rules that a teacher without a model may follow: what `services.teacher.rules` names in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def echo(messages: Sequence[Mapping[str, str]], seed: int) -> str:
    """The last message again, with the seed; ValueError for "no"."""
    said = messages[-1]["content"]
    if said == "no":
        raise ValueError("I would rather not")
    return f"{said} {seed}"
