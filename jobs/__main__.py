"""`python -m jobs --workspace W --round R --stage S`: the body that the run's recipe has for a stage."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hpc_rl.orchestrate.job import load, parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """What the body returns."""
    arguments = parse_arguments(None, argv)
    body = load(arguments.workspace, arguments.round, arguments.stage).stage.job
    words = ["--workspace", str(arguments.workspace), "--round", str(arguments.round), "--stage", arguments.stage]
    return int(importlib.import_module(body).main(words))


if __name__ == "__main__":
    sys.exit(main())
