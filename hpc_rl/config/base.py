"""What all sections of the config share: immutable, no unknown keys, and marks for fields that hold paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Fault:
    """Values that do not go together: which field to change (keys from the section that found it), why, and how."""

    field: tuple[str, ...]
    what: str
    expected: str = ""
    way_out: str = ""


class Section(BaseModel):
    """A mapping in the YAML. Every field carries a docstring; `docs/config.md` is made from them."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, defer_build=True)

    def faults(self) -> Iterator[Fault]:
        """What is wrong with this section although each of its values is right by itself."""
        yield from ()

    @model_validator(mode="after")
    def _without_faults(self) -> Self:
        raise_faults(self.faults())
        return self


def raise_faults(faults: Iterable[Fault]) -> None:
    """Hand faults, if any, to pydantic from within a validator; `report` unpacks them again."""
    found = tuple(faults)
    if found:
        raise PydanticCustomError("faults", "{text}", {"text": "; ".join(f.what for f in found), "faults": found})


@dataclass(frozen=True)
class PathMark:
    """Says that the loader expands `~`, `$VAR`, `${VAR}` and `${VAR:-default}` in a field.

    Relative paths are then taken from the current directory. With `command=True` a name without a slash stays as it is,
    to be found on the PATH of the machine where it runs.
    """

    command: bool = False


FilePath = Annotated[Path, PathMark()]
"""A file or folder. In YAML relative to the current directory; absolute once loaded."""

ModelPath = Annotated[str, PathMark(), Field(min_length=1)]
"""A Hugging Face model folder, as text because libraries want it so. Absolute once loaded; never a hub name."""

CommandPath = Annotated[str, PathMark(command=True), Field(min_length=1)]
"""A program: a path, or a name to find on the PATH where it runs."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
FreeMapping = dict[str, Any]
