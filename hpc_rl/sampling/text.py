"""A round's sampling as people read it, in lines of 120 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from hpc_rl.sampling.lives import PARTS
from hpc_rl.sampling.summary import Settings, Summary, Worker
from hpc_rl.sampling.tally import Tally

COLUMNS = 120
LABEL = 12
"""Columns of what stands before each line."""

TRIES_SHOWN = 10
"""Numbers of tries that the histogram names; what is beyond is one number."""

VALUES_SHOWN = 3
"""Different values of an engine's setting that are named."""

WORDS = {"start_up": "start-up", "publishing": "files"}


def text(title: str, sampled: Summary) -> str:
    """The section of a report, without a final newline."""
    lines = [f"{title}: {_tasks(sampled)}"]
    lines += _line("drawn", _drawn(sampled))
    if sampled.tokens_per_s:
        lines += _line("speed", _speed(sampled))
    lines += _roles(sampled.published.tally)
    shares = ", ".join(f"{WORDS.get(part, part)} {100 * sampled.share(part):.1f} %" for part in PARTS)
    lines += _line("time", f"{_seconds(sampled.task_s)} of tasks: {shares}")
    if sampled.loaded:
        parts = ", ".join(f"{name} {seconds / sampled.loaded:.1f} s" for name, seconds in sampled.loading.items())
        lines += _line("start-up", f"{parts} (mean of {_count(sampled.loaded, 'task')})")
    if sampled.published.accepted:
        lines += _line("cost", _cost(sampled))
    for engine, settings in sampled.engines.items():
        lines += _line("engine", ", ".join([engine, *_settings(settings)]))
    if sampled.workers:
        lines += _line("workers", _workers(sampled.workers))
    return "\n".join(lines)


def _tasks(sampled: Summary) -> str:
    notes = [f"{n} {word}" for n, word in ((sampled.running, "running"), (sampled.killed, "killed")) if n]
    return _count(sampled.tasks, "task") + (f" ({', '.join(notes)})" if notes else "")


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
        said = [f"{accepted:,} of {attempts:,} accepted{share}", f"tasks by tries {_histogram(tally.tries[role])}"]
        said.append(f"{exhausted:,} of {tally.tasks(role):,} tasks exhausted")
        yield from _line(role, "; ".join(said))


def _histogram(tries: Mapping[int, int]) -> str:
    """`4: 120, 5: 3`; of many numbers the first, and how many tasks took more."""
    numbers = sorted(tries)
    shown = [f"{number}: {tries[number]:,}" for number in numbers[:TRIES_SHOWN]]
    if more := numbers[TRIES_SHOWN:]:
        shown.append(f"{more[0]} to {more[-1]}: {sum(tries[number] for number in more):,}")
    return ", ".join(shown)


def _cost(sampled: Summary) -> str:
    of_tasks = f"{sampled.seconds_per_accepted:.3g} s of tasks"
    if sampled.gpu_s:
        return f"{sampled.gpu_s_per_accepted:.3g} GPU seconds for each accepted sample ({of_tasks})"
    return f"{of_tasks} for each accepted sample (no GPUs)"


def _settings(settings: Settings) -> Iterable[str]:
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
            yield f"{name} " + " or ".join(f"{value} ({_count(tasks, 'task')})" for value, tasks in ordered)


def _workers(workers: Sequence[Worker]) -> str:
    said = [_count(len(workers), "engine")]
    if shares := sorted(100 * worker.busy_s / worker.up_s for worker in workers if worker.up_s):
        said.append(f"busy {shares[0]:.0f} to {shares[-1]:.0f} % of their time")
    if deaths := sum(worker.deaths for worker in workers):
        said.append(f"died and replaced {_count(deaths, 'time')}")
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
