"""`python -m hpc_rl.doctor CONFIG`: would the run start, and would it go on? Looks at all it needs; changes nothing.

`--quick` waits for nobody longer than a second and starts no process for a stage.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.choose import executor_name
from hpc_rl.config import ConfigError
from hpc_rl.health.disk import disk
from hpc_rl.health.endpoints import endpoint, named
from hpc_rl.health.findings import Finding, Subject, of_problem
from hpc_rl.health.machine import machine
from hpc_rl.health.packages import packages
from hpc_rl.health.paths import paths
from hpc_rl.health.slurm import slurm
from hpc_rl.health.state import state

QUICK_S, THOROUGH_S = 1.2, 180.0
"""After so long a check that has not ended is given up, and said to be."""
WIDTH = 120

Check = Callable[[], Iterable[Finding]]


def examine(subject: Subject) -> list[Finding]:
    """All checks of a run, at the same time; their findings in a fixed order."""
    checks: dict[str, Check] = {
        "paths": partial(paths, subject),
        "disk": partial(disk, subject),
        "state": partial(state, subject),
        **{f"endpoint {name}": partial(endpoint, subject, name) for name in named(subject)},
        **({"Slurm": partial(slurm, subject)} if subject.executor == "slurm" else {"GPUs": partial(machine, subject)}),
        "packages": partial(packages, subject),
    }
    limit_s = QUICK_S if subject.quick else THOROUGH_S
    deadline = time.monotonic() + limit_s
    pool = ThreadPool(len(checks))  # its threads are daemons: one that hangs on a dead file server does not keep us
    under_way = {name: pool.apply_async(lambda check=check: list(check())) for name, check in checks.items()}
    found = []
    for name, result in under_way.items():
        try:
            found += result.get(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            remedy = "ask without --quick" if subject.quick else "see whether a file server or the network hangs"
            found.append(Finding(name, "warning", f"the check has not ended within {limit_s:g} s", remedy))
        except OSError as error:  # a folder that we may not enter, a file server that is away
            found.append(Finding(name, "problem", str(error), "see that you may read it, and that its disk is there"))
    return found


def consult(arguments: argparse.Namespace) -> list[Finding]:
    """Findings on the config, and, where that can be used, on everything else."""
    overrides = [*arguments.set, *([f"cluster.executor={arguments.executor}"] if arguments.executor else [])]
    try:
        loaded = configs.load_with_places(arguments.config, overrides, workspace=arguments.workspace)
    except ConfigError as error:
        return [of_problem("config", problem) for problem in error.problems]
    config = loaded.config
    found = [
        Finding("config", "ok", f"{arguments.config}: recipe {config.recipe}, {config.run.rounds} rounds, "
                                f"executor {executor_name(config)}, hash {configs.config_hash(config)[:12]}")
    ]  # fmt: skip
    found += [Finding("config", "ok", note) for note in loaded.translated]
    found += [Finding("config", "warning", note, "change it if that is not what you meant") for note in loaded.notes]
    subject = Subject(config, recipes.graph_of(config), executor_name(config), arguments.quick, loaded.places)
    return [*found, *examine(subject)]


def page(found: Sequence[Finding]) -> str:
    """Findings as people read them: a line each, and what to do about it."""
    lines = []
    for finding in found:
        head = f"{finding.area:<10} {finding.level:<8} "
        for label, said in ((head, finding.what), (" " * len(head), finding.remedy and f"remedy: {finding.remedy}")):
            lines += textwrap.wrap(
                said, WIDTH, initial_indent=label, subsequent_indent=" " * len(head), break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join([*lines, "", verdict(found)])


def verdict(found: Sequence[Finding]) -> str:
    """The last line."""
    problems, warnings = (sum(finding.level == level for finding in found) for level in ("problem", "warning"))
    counted = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((problems, "problem"), (warnings, "warning")) if n]
    return " and ".join(counted) or "all is well"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when nothing stands in the way, warnings or not, and 1 when there are problems."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.doctor",
        description="Look at everything a run needs: config, paths, disk, workspace, endpoints, GPUs, Slurm, packages.",
    )
    parser.add_argument("config", type=Path, help="YAML file, as for launch")
    parser.add_argument("--quick", action="store_true", help="in under 3 s: wait for nobody, start no interpreters")
    parser.add_argument("--workspace", type=Path, help="folder of the run (default: run.workspace in the config)")
    parser.add_argument("--executor", choices=("slurm", "local", "debug"), help="as for launch")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for launch")
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts")
    arguments = parser.parse_args(argv)
    found = consult(arguments)
    print(json.dumps([asdict(finding) for finding in found], indent=2) if arguments.json else page(found))
    return int(any(finding.level == "problem" for finding in found))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error
    sys.exit(main())
