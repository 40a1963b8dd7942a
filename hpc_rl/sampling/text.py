"""A round's sampling as people read it, in lines of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from hpc_rl.cluster.failures import Outcome
from hpc_rl.sampling.lives import PARTS
from hpc_rl.sampling.summary import Lowered, Settings, Summary, Worker
from hpc_rl.sampling.tally import Tally

COLUMNS = 120
LABEL = 12
"""Columns of what stands before each line."""

TRIES_SHOWN = 10
"""Numbers of tries that the histogram names; what is beyond is one number."""

VALUES_SHOWN = 3
"""Different values of an engine's setting that are named."""

ENDS = {
    Outcome.KILLED.value: "killed",
    Outcome.OUT_OF_MEMORY.value: "out of memory",
    Outcome.ERROR.value: "with an error",
    Outcome.BLOCKED.value: "blocked",
    Outcome.LEFT.value: "told to leave",
}
"""Ends of tasks before their work was done, and how they are called."""

EXPLAINED = (Outcome.OUT_OF_MEMORY.value, Outcome.ERROR.value)
"""Ends whose last error is shown; of a killed task the last line says nothing."""

LONGEST_ERROR = 300
"""Characters of an error; the log has all of it."""

OF_NO_INTEREST = ("notches", "compile_cache", "staged")
"""An engine's settings that are said elsewhere, or are paths which every task has of its own."""

WORDS = {"start_up": "start-up", "publishing": "files"}


def text(title: str, sampled: Summary) -> str:
    """The section of a report, without a final newline."""
    lines = [f"{title}: {_tasks(sampled)}"]
    for outcome in EXPLAINED:
        if outcome in sampled.last:
            lines += _line("trouble", _last_error(sampled, outcome))
    lines += _line("drawn", _drawn(sampled))
    if sampled.tokens_per_s:
        lines += _line("speed", _speed(sampled))
    lines += _roles(sampled.published.tally)
    shares = ", ".join(f"{WORDS.get(part, part)} {100 * sampled.share(part):.1f} %" for part in PARTS)
    lines += _line("time", f"{_seconds(sampled.task_s)} of tasks: {shares}")
    if len(sampled.at_work_s) > 1:
        lines += _line("balance", _balance(sampled))
    if sampled.loaded:
        parts = ", ".join(f"{name} {seconds / sampled.loaded:.1f} s" for name, seconds in sampled.loading.items())
        lines += _line("start-up", f"{parts} (mean of {_count(sampled.loaded, 'task')})")
    if sampled.published.accepted:
        lines += _line("cost", _cost(sampled))
    for engine, settings in sampled.engines.items():
        shown = {name: values for name, values in settings.items() if name not in OF_NO_INTEREST}
        lines += _line("engine", ", ".join([engine, *_settings(shown)]))
    for lowered in sampled.lowered:
        lines += _line("memory", _lowered(lowered))
    if sampled.workers:
        lines += _line("workers", _workers(sampled.workers))
    return "\n".join(lines)


def _tasks(sampled: Summary) -> str:
    notes = [f"{sampled.running} running"] if sampled.running else []
    notes += [f"{sampled.ends[outcome]} {word}" for outcome, word in ENDS.items() if outcome in sampled.ends]
    return _count(sampled.tasks, "task") + (f" ({', '.join(notes)})" if notes else "")


def _last_error(sampled: Summary, outcome: str) -> str:
    last, which = sampled.last[outcome], "the last one" if sampled.ends[outcome] > 1 else "it"
    error = last.error if len(last.error) <= LONGEST_ERROR else last.error[:LONGEST_ERROR] + " …"
    return f"{sampled.ends[outcome]} {ENDS[outcome]}; {which} said: {error or 'nothing'} (log: {last.log})"


def _drawn(sampled: Summary) -> str:
    done = sampled.published
    parts = [f"{_count(done.samples, 'sample')} of {_count(done.prompts, 'prompt')}, {done.tokens:,} tokens"]
    if done.cut_off:
        parts.append(f"{_count(done.cut_off, 'sample')} cut off at the longest length")
    if done.dropped:
        parts.append(f"{_count(done.dropped, 'prompt')} left out as too long")
    if sampled.lost_tokens:
        parts.append(f"{sampled.lost_tokens:,} tokens lost")
    return "; ".join(parts)


def _speed(sampled: Summary) -> str:
    return (
        f"{sampled.tokens_per_s:,.0f} tokens/s of a task while sampling, "
        f"{sampled.tokens_per_s_with_start_up:,.0f} with start-up; {sampled.tokens_per_s_of_all:,.0f} of all tasks "
        f"together in {_seconds(sampled.wall_s)}; batches {100 * sampled.fullness:.0f} % full"
    )


def _roles(tally: Tally) -> Iterable[str]:
    for role in sorted(tally.tries):
        attempts, accepted, exhausted = tally.attempts(role), tally.accepted.get(role, 0), tally.exhausted.get(role, 0)
        share = f" ({100 * accepted / attempts:.1f} %)" if attempts else ""
        said = [f"{accepted:,} of {attempts:,} accepted{share}", f"prompts by tries {_histogram(tally.tries[role])}"]
        said.append(f"{exhausted:,} of {tally.tasks(role):,} prompts exhausted")
        yield from _line(role, "; ".join(said))


def _histogram(tries: Mapping[int, int]) -> str:
    """`4: 120, 5: 3`; of many numbers the first, and how many prompts took more."""
    numbers = sorted(tries)
    shown = [f"{number}: {tries[number]:,}" for number in numbers[:TRIES_SHOWN]]
    if more := numbers[TRIES_SHOWN:]:
        shown.append(f"{more[0]} to {more[-1]}: {sum(tries[number] for number in more):,}")
    return ", ".join(shown)


def _balance(sampled: Summary) -> str:
    tasks = sampled.at_work_s
    mean_s, most_s = sum(tasks) / len(tasks), max(tasks)
    return (
        f"the busiest of {_count(len(tasks), 'task')} was at work for {_seconds(most_s)}, the mean is "
        f"{_seconds(mean_s)} ({sampled.imbalance:.2f} times)"
    )


def _cost(sampled: Summary) -> str:
    of_tasks = f"{sampled.seconds_per_accepted:.3g} s of tasks"
    if sampled.gpu_s:
        return f"{sampled.gpu_s_per_accepted:.3g} GPU seconds for each accepted sample ({of_tasks})"
    return f"{of_tasks} for each accepted sample (no GPUs)"


def _settings(settings: Settings, of: str = "task") -> Iterable[str]:
    """`max_num_seqs 256 (7 tasks) or 128 (1 task)`; what every task has its own of is only counted."""
    for name, values in settings.items():
        if set(values) <= {"None", "", "[]", "{}"}:
            continue
        if len(values) > VALUES_SHOWN:
            yield f"{name}: {len(values)} different"
        elif len(values) == 1:
            yield f"{name} {next(iter(values))}"
        else:
            ordered = sorted(values.items(), key=lambda item: -item[1])
            yield f"{name} " + " or ".join(f"{value} ({_count(number, of)})" for value, number in ordered)


def _lowered(lowered: Lowered) -> str:
    times = "once" if lowered.notches == 1 else f"{lowered.notches} times"
    taken = ", ".join(_settings(lowered.settings, "engine"))
    return f"lowered after running out {times}: {taken} ({_count(lowered.engines, 'engine')})"


def _workers(workers: Sequence[Worker]) -> str:
    said = [_count(len(workers), "engine")]
    if shares := sorted(100 * worker.busy_s / worker.up_s for worker in workers if worker.up_s):
        said.append(f"busy {shares[0]:.0f} to {shares[-1]:.0f} % of their time")
    if deaths := sum(worker.deaths for worker in workers):
        hung = sum(worker.hung for worker in workers)
        said.append(f"died and replaced {_count(deaths, 'time')}" + (f", {hung} of them hung" if hung else ""))
    return "; ".join(said)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _line(label: str, said: str) -> list[str]:
    head = f"  {label:<{LABEL - 2}}" if len(label) < LABEL - 2 else f"  {label}  "
    return textwrap.wrap(
        said,
        COLUMNS,
        initial_indent=head,
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )
