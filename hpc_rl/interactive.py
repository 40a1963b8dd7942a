"""`launch --interactive`: before each round a person says whether it runs (systems.md S12).

A letter at a prompt, in a terminal or over a pipe: `printf 'c\\nc\\nq\\n' | python -m hpc_rl.launch … --interactive`.
Nothing of a round is submitted before its `c`, so whoever leaves leaves nothing behind that goes on by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from hpc_rl.cluster.base import Executor, ExecutorError
from hpc_rl.orchestrate import gate, overview
from hpc_rl.orchestrate.decide import Decision
from hpc_rl.orchestrate.reconcile import Run, RunBusy, look
from hpc_rl.run.ledger import Ledger
from hpc_rl.status import table

CONTINUE, STATUS, QUIT, RETRY = "c", "s", "q", "r"
WORDS = {CONTINUE: "continue", STATUS: "status", QUIT: "quit", RETRY: "retry"}


@dataclass(frozen=True)
class Standing:
    """Where a run stands: the round that comes next, of how many, and what stopped it, '' if nothing did.

    `given_up`: what the round before went on without.
    """

    round: int
    rounds: int
    finished: bool = False
    failure: str = ""
    given_up: tuple[str, ...] = ()

    @property
    def operations(self) -> str:
        """The letters that may be typed."""
        return CONTINUE + STATUS + QUIT + (RETRY if self.failure else "")


def standing(run: Run, failure: str = "") -> Standing:
    """Where a run stands by its manifests. Round 0, the preparation, counts as a part of round 1.

    Parameters
    ----------
    failure
        Why the round ended early, where the ledger does not say it.
    """
    undone = [stage.round for stage in run.graph.work if not gate.is_complete(run.ws, stage)]
    history = Ledger(run.ws).history()
    current = max(1, min(undone, default=run.graph.rounds))
    lost = tuple(f"{name}: {why}" for (round, name), why in history.given_up.items() if round == current - 1)
    return Standing(current, run.graph.rounds, not undone, history.stopped or failure, lost)


def block(now: Standing) -> str:
    """What is said before the prompt."""
    able = f"Yes, by a retry: {now.failure}" if now.failure else "Yes"
    return "\n".join(
        [
            "",
            "Current Status:",
            f"   - Current Round: {now.round}",
            f"   - Completed Rounds: {now.round - 1}",
            f"   - Total Rounds: {now.rounds}",
            f"   - Can Continue: {able}",
            *(f"   - Given Up in Round {now.round - 1}: {lost}" for lost in now.given_up),
            "",
            f"Preparing to execute Round {now.round}",
        ]
    )


def ask(now: Standing) -> str:
    """The letter that a person chooses; whoever goes away, with Ctrl-C or the end of the input, quits."""
    choices = "".join(f" [{letter}]{WORDS[letter]}" for letter in now.operations)
    while True:
        said = _answer(f"Please select operation{choices}: ")
        if said is None:
            return QUIT
        for letter in now.operations:
            if said in (letter, WORDS[letter]):
                return letter
        if said in (RETRY, WORDS[RETRY]):
            print("nothing has failed: c runs the round", flush=True)
        elif said:
            print(f"{said!r} is none of {', '.join(now.operations)}", flush=True)


def _answer(prompt: str) -> str | None:
    """What is typed, None when nobody is there any more."""
    if sys.stdin is None:  # closed by whoever started us
        return None
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # an interpreter without it has a prompt without editing
            import readline  # noqa: F401  # input() uses it from here on
    try:
        said = input(prompt).strip().lower()
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return None
    if not terminal:
        print(said, flush=True)  # nobody has seen it being typed
    return said


def operate(run: Run, executor: Executor, play: Callable[[int], Decision]) -> Decision | None:
    """Play round after round, each when a person says so.

    Parameters
    ----------
    play
        Goes on with the run until this round has ended, or the run has.

    Returns
    -------
    How the run ended: finished, or stopped and left so. None when it was left where it can go on.
    """
    failure = ""
    while True:
        now = standing(run, failure)
        if now.finished:
            return play(now.rounds)  # which may have something to remove
        print(block(now), flush=True)
        while (chosen := ask(now)) == STATUS:
            _show(run, executor)
        if chosen == QUIT:
            return Decision(status="stopped", reason=now.failure) if now.failure else None
        try:
            decision = play(now.round)
        except (ExecutorError, RunBusy) as error:
            failure = str(error)
            continue
        if decision.status == "finished":
            return decision
        failure = decision.reason if decision.status == "paused" else ""


def _show(run: Run, executor: Executor) -> None:
    try:
        print(table(run.ws.root, overview.build(look(run, executor))), flush=True)
    except ExecutorError as error:
        print(error, flush=True)
