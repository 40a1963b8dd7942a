"""`python -m hpc_rl.launch CONFIG`: start a run, or go on with it. On a cluster it submits and returns."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpc_rl import config as configs
from hpc_rl import recipes
from hpc_rl.cluster.base import ExecutorError
from hpc_rl.cluster.choose import executor_name, gpu_ids, make_executor, slurm_problems
from hpc_rl.config import ConfigError
from hpc_rl.config.checks import check
from hpc_rl.config.errors import Problem, format_problems
from hpc_rl.config.schema import Config
from hpc_rl.orchestrate import plan
from hpc_rl.orchestrate.decide import Decision, Policy
from hpc_rl.orchestrate.gpus import gpu_problems
from hpc_rl.orchestrate.graph import ADVANCE
from hpc_rl.orchestrate.reconcile import DRIVER_LEASE, Run, RunBusy, look, reconcile
from hpc_rl.orchestrate.start import OtherConfig, open_run, store_config
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.closed import NotClosed, keep_closed
from hpc_rl.run.code import snapshot
from hpc_rl.run.lease import Lease, acquire
from hpc_rl.run.lease import look as look_at_lease
from hpc_rl.run.ledger import Ledger
from hpc_rl.run.workspace import Workspace


def say(line: str) -> None:
    """One line of progress, with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc_rl.launch",
        description="Start a run, or go on with it where it stands. Launching a run that is under way changes nothing.",
        epilog="Then, with its WORKSPACE: python -m hpc_rl.status · python -m hpc_rl.report · python -m hpc_rl.cancel",
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/tiny/lewis.yaml")
    parser.add_argument("--workspace", type=Path, help="folder of the run (default: run.workspace in the config)")
    parser.add_argument(
        "--executor", choices=("slurm", "local", "debug"), help="where jobs run (default: slurm where there is sbatch)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a field, e.g. run.rounds=5; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show rounds, stages, dependencies and resources; submit and write nothing",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: show the exact scripts")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--init", action="store_true", help="make the workspace and stop: for those who submit slurm_templates/ by hand"
    )
    way.add_argument(
        "--watch", action="store_true", help="stay and advance the run from here, where compute nodes may not submit"
    )
    way.add_argument(
        "--interactive",
        action="store_true",
        help="stay, and ask before each round: c continue, s status, q quit, r retry what failed",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the run is submitted, finished, or left at the prompt where it can go on; 1 when it stopped.

    2 when it cannot start, 130 after Ctrl-C or SIGTERM while it ran.
    """
    arguments = parse(argv)
    if arguments.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` is no error; a launch that works outlives its reader
    keep_closed()
    overrides = [*arguments.set, *([f"cluster.executor={arguments.executor}"] if arguments.executor else [])]
    try:
        loaded = configs.load_with_places(arguments.config, overrides, workspace=arguments.workspace)
        for note in (*loaded.translated, *loaded.notes):
            say(note)
        name = executor_name(loaded.config)
        problems = check(loaded.config, loaded.places)
        if name == "local" and not (arguments.init or problems):
            problems = too_few_gpus(loaded.config)
        if arguments.dry_run:
            plan.show(loaded.config, name, arguments.verbose)
            if problems:
                print(f"before it can be launched, {format_problems(problems)}")
            return 0
        if name == "slurm" and not (arguments.init or problems):
            problems = slurm_problems(loaded.config)
        if problems:
            raise ConfigError(problems)
        return start(recipes.resolve(loaded.config), name, arguments)
    except (ConfigError, OtherConfig, RunBusy, ExecutorError, CorruptFile, NotClosed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def too_few_gpus(config: Config) -> list[Problem]:
    """What this machine has too few GPUs for, before a run begins; one that has begun may be past it."""
    if Workspace(config.run.workspace).config_path.exists():
        return []
    return gpu_problems(config, recipes.graph_of(config), len(gpu_ids(os.environ)))


def start(config: Config, executor: str, arguments: argparse.Namespace) -> int:
    """Open the run and hand it to the executor."""
    run = open_run(config, arguments.config)
    if arguments.init:
        take_over_config(run, arguments)
        print(f"workspace: {run.ws.root}\nNow: slurm_templates/round.sh {run.ws.root} 0")
        return 0
    by_jobs = executor == "slurm" and config.cluster.advance == "jobs" and not arguments.interactive
    policy = Policy.of(config.run, control=by_jobs)
    if by_jobs and not arguments.watch:
        return submit(run, policy, arguments)
    asks_slurm = executor == "slurm" and arguments.interactive
    if queued := advance_jobs(run) if asks_slurm else others_jobs(run, executor):
        print(f"already running: Slurm jobs {queued}. Nothing was changed.\n{plan.commands(run.ws.root)}")
        return 0
    lease = acquire(run.ws.lease_folder, DRIVER_LEASE, config.run.lease_ttl_s)
    if lease is None:
        return already_driven(run)
    with lease:
        take_over_config(run, arguments)
        return drive(run, executor, policy, lease, arguments.interactive)


def take_over_config(run: Run, arguments: argparse.Namespace) -> None:
    """From here on the run goes on with our config: nobody else drives it."""
    for note in store_config(run, arguments.config):
        say(note)


def others_jobs(run: Run, executor: str) -> str:
    """Ids of jobs that another executor still has queued for this run, '' when there are none."""
    names = [a.name for a in Ledger(run.ws).history().attempts if a.executor == "slurm"]
    if executor == "slurm" or not names or shutil.which("squeue") is None:
        return ""
    return ", ".join(sorted({job.job_id for job in make_executor(run.config, "slurm").queue(names)}))


def advance_jobs(run: Run) -> str:
    """Ids of queued jobs by which a run goes on without anybody, '' where it is paused or has stopped."""
    history = Ledger(run.ws).history()
    names = [a.name for a in history.attempts if a.stage == ADVANCE and a.executor == "slurm"]
    if not names or history.paused or history.stopped:
        return ""
    return ", ".join(sorted({job.job_id for job in make_executor(run.config, "slurm").queue(names)}))


def already_driven(run: Run) -> int:
    """Say who drives the run."""
    holder = look_at_lease(run.ws.lease_folder, DRIVER_LEASE).holder
    print(f"already running: {holder} drives {run.ws.root}. Nothing was changed.\n{plan.commands(run.ws.root)}")
    return 0


def _snapshot(run: Run) -> Path:
    return snapshot(run.ws, recipes.own_packages(run.config.recipe))


def submit(run: Run, policy: Policy, arguments: argparse.Namespace) -> int:
    """Submit what the run needs next and return."""
    from hpc_rl import report

    if look_at_lease(run.ws.lease_folder, DRIVER_LEASE).is_held(run.config.run.lease_ttl_s):
        return already_driven(run)
    executor = make_executor(run.config, "slurm")
    view = look(run, executor)
    waiting_for_nothing = view.history.paused or view.history.stopped
    control = {a.name for a in view.history.attempts if a.stage == ADVANCE}
    if not waiting_for_nothing and any(job.name in control for job in view.queue):
        jobs = sorted({job.job_id.partition("_")[0] for job in view.queue})
        print(
            f"already running: jobs {', '.join(jobs)} of {run.ws.root}. Nothing was changed.\n"
            f"{plan.commands(run.ws.root)}"
        )
        return 0
    take_over = partial(take_over_config, run, arguments)
    result = reconcile(run, executor, _snapshot(run), policy, resume=True, on_work=take_over, say=say)
    for note in result.notes:
        say(note)
    if result.decision.status == "finished":
        report.write(run)
        print(f"the run in {run.ws.root} is finished.\n{plan.commands(run.ws.root)}")
        return 0
    if result.decision.status == "stopped":
        report.write(run)
        print(f"the run stopped: {result.decision.reason}", file=sys.stderr)
        return 1
    if not result.submitted:
        print(
            f"already running: another launch of {run.ws.root} was faster. Nothing was changed.\n"
            f"{plan.commands(run.ws.root)}"
        )
        return 0
    ids = [i for ids in result.submitted.values() for i in ids]
    print(
        f"submitted {len(ids)} jobs: {', '.join(ids)}\nworkspace: {run.ws.root}\n"
        f"{plan.commands(run.ws.root)}\nyou can log off."
    )
    return 0


def drive(run: Run, name: str, policy: Policy, lease: Lease, ask: bool = False) -> int:
    """Run or advance the run from this process until it ends; with `ask`, each round when a person says so."""
    from hpc_rl import interactive, report
    from hpc_rl.cluster.local import LocalExecutor
    from hpc_rl.orchestrate.follow import follow, write_local_queue

    executor = make_executor(run.config, name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout`, or the end of an allocation: as Ctrl-C
    if isinstance(executor, LocalExecutor):
        write_local_queue(run, executor)  # what an earlier launcher has written there is over
    try:
        say(f"run {run.config.run.name} in {run.ws.root}, executor {name}. {lease.holder} drives it; Ctrl-C pauses it.")
        print(plan.commands(run.ws.root))

        def play(until: int | None) -> Decision:  # with the code as it is now: what failed may have been mended
            try:
                return follow(run, executor, _snapshot(run), replace(policy, until=until), say, poll_s=10.0)
            finally:
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # bodies that ran in here had theirs

        decision = interactive.operate(run, executor, play) if ask else play(None)
    except KeyboardInterrupt:
        say("interrupted: telling the jobs to leave" if name != "slurm" else "interrupted: jobs that are queued go on")
        if isinstance(executor, LocalExecutor):
            executor.shutdown()
            Ledger(run.ws).append("paused", why="the launcher was interrupted")
        print(f"nothing is lost; go on with the same command. {plan.commands(run.ws.root)}")
        return 130
    except Exception:
        if isinstance(executor, LocalExecutor):
            executor.shutdown()  # jobs that run here would die with us: let them leave as at Ctrl-C
        raise
    if decision is None:
        print(f"nothing is lost; go on with the same command. {plan.commands(run.ws.root)}")
        return 0
    if decision.status == "finished":
        print(f"the run in {run.ws.root} is finished.")
        print(report.write(run))
        print(plan.commands(run.ws.root))
        return 0
    print(report.write(run))
    print(f"the run {decision.status}: {decision.reason}\nlaunch again to go on.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
