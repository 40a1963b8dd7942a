"""What is wrong with a config: where, what was expected, the way out. All problems of a config are reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that must be changed before the run may start.

    Attributes
    ----------
    field
        Dotted path of the config field, `sample.shard_size`; empty when the problem is a whole file.
    what
        What is wrong, with the value at fault.
    expected
        What would be right; may be empty where `what` says it.
    way_out
        What the user can do.
    where
        Who set the field: `configs/lewis.yaml:12`, `--set`, `environment variable LORA_RANK`; empty when unknown.
    """

    field: str
    what: str
    expected: str = ""
    way_out: str = ""
    where: str = ""

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.field, self.what) if part)
        lines = [head]
        if self.expected:
            lines.append(f"    expected: {self.expected}")
        if self.way_out:
            lines.append(f"    way out:  {self.way_out}")
        return "\n".join(lines)


class ConfigError(Exception):
    """The config cannot be used. `problems` has every reason; the text lists them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(format_problems(self.problems))


def format_problems(problems: Sequence[Problem]) -> str:
    """Problems as a user reads them, one after the other, under a line that counts them."""
    title = "the config has a problem" if len(problems) == 1 else f"the config has {len(problems)} problems"
    return "\n".join([f"{title}:", *(f"  {line}" for problem in problems for line in str(problem).splitlines())])
