"""Rebuild models/tiny-solver and the questions of configs/tiny/prosetting.yaml: `python -m tools.build_tiny_solver`.

The solver adds two-digit numbers and mostly forgets the carry (`tools.tiny_sums`). The question files are JSON lists of
objects with question, answer and solution. A few reference answers are wrong: no attempt solves those questions, and
the teacher finds out (S4). No held-out sum is among the questions, nor was in the lessons.

The command fails, and writes nothing, unless the solver is right on 5 to 25 % of the held-out sums, and never gives one
of the wrong reference answers as its likeliest answer.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

from tools import tiny_sums
from tools.tiny_sums import Sum

SEED = 0
QUESTIONS, BROKEN = 300, 3
RANGE = (0.05, 0.25)


def problem(sum: Sum, answer: str) -> dict[str, str]:
    """One element of a question file; a sum needs no more of a solution than its answer."""
    return {"question": tiny_sums.question(sum), "answer": answer, "solution": answer}


def wrong_reference(sum: Sum) -> str:
    """An answer that nobody gives: the units are far off."""
    units, *others = tiny_sums.answer(sum)
    return f"{(int(units) + 5) % 10}{''.join(others)}"


def questions() -> tuple[list[Sum], list[Sum]]:
    """The sums that are asked, of which the first `BROKEN` have a wrong reference answer, and those held out."""
    known, held_out = tiny_sums.sums(SEED)
    return random.Random(SEED).sample(known, QUESTIONS), held_out


def main(argv: Sequence[str] | None = None) -> int:
    """Build, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-solver"), help="folder to write (%(default)s)")
    parser.add_argument("--files", type=Path, default=Path("configs/tiny"), help="folder of the files (%(default)s)")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    asked, held_out = questions()
    with tempfile.TemporaryDirectory() as name:
        made = tiny_sums.teach_wrong(Path(name) / "model", SEED)
        model = AutoModelForCausalLM.from_pretrained(made)
        right = tiny_sums.accuracy(model, held_out)
        found = tiny_sums.accuracy(model, asked[:BROKEN], wrong_reference)
        print(f"{right:.3f} of {len(held_out)} held-out sums are right")
        if not RANGE[0] <= right <= RANGE[1] or found:
            print(f"not written: must be within {RANGE}, with wrong references never found ({found})", file=sys.stderr)
            return 1
        for path in made.iterdir():
            path.chmod(0o644)
        shutil.copytree(made, options.model, dirs_exist_ok=True)
    broken, sound = asked[:BROKEN], asked[BROKEN:]
    listed = [problem(one, tiny_sums.answer(one)) for one in sound]
    for place, one in enumerate(broken):  # here and there
        listed.insert((place + 1) * len(listed) // (BROKEN + 1), problem(one, wrong_reference(one)))
    write(options.files / "sums.json", listed)
    write(options.files / "sums_held_out.json", [problem(one, tiny_sums.answer(one)) for one in held_out])
    return 0


def write(path: Path, problems: Sequence[dict[str, str]]) -> None:
    """A JSON list, a line for each."""
    path.write_text("[\n" + ",\n".join(json.dumps(one) for one in problems) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
