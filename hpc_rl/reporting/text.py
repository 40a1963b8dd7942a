"""A report as a page of text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from hpc_rl.recipes.columns import Number
from hpc_rl.reporting.data import Report, Rows, Training, Trouble
from hpc_rl.sampling.text import text as sampling_text
from hpc_rl.units import duration, size

LONGEST_ERROR = 300
"""Characters of an error; the log has all of it."""


def text(report: Report) -> str:
    """The page, without a final newline."""
    sections: list[Iterable[str]] = [
        _head(report),
        *(_table(rows) for rows in report.tables),
        _trainings(report.trainings),
        _troubles(report),
        _costs(report),
        _storage(report),
        *([sampling_text(f"round {s.round} {s.stage}", s.summary)] for s in report.sampling),
        _damaged(report.damaged),
    ]
    made = ("\n".join(section) for section in sections)
    return "\n\n".join(section for section in made if section)


def _head(report: Report) -> Iterator[str]:
    times = report.times
    yield f"{report.name}: {report.workspace}"
    yield f"{report.status}{f': {report.reason}' if report.reason else ''}"
    yield from report.notes
    yield (
        f"{report.rounds_done} of {report.rounds_planned} rounds, {sum(c.processes for c in report.costs)} processes, "
        f"{report.gpu_hours:.2f} GPU hours"
    )
    if times.began is not None:
        until = f" to {_date(times.ended)}" if times.ended is not None else ", and still under way"
        yield f"{duration(times.wall_s)}: {_date(times.began)}{until}"
        if times.stood_still_s >= 1:
            yield f"  {duration(times.stood_still_s)} of that it was paused or stopped"
        if times.waited_s >= 1:
            yield f"  {duration(times.waited_s)} jobs waited for their start (summed over jobs)"


def _table(rows: Rows) -> Iterator[str]:
    yield f"{rows.table.title}{f': {rows.about}' if rows.about else ''}"
    body = [[str(round), *(cell(numbers.get(title)) for title in rows.shown)] for round, numbers in rows.rows.items()]
    yield from grid(["round", *rows.shown], body)
    for column in rows.table.columns:
        if column.note and column.title in rows.shown:
            yield f"  {column.title}: {column.note}"
    for trend in rows.trends:
        yield (
            f"  trend: {trend.title} {cell(trend.first)} in round {trend.first_round} → "
            f"{cell(trend.last)} in round {trend.last_round}"
        )


def _trainings(trainings: Sequence[Training]) -> Iterator[str]:
    if not trainings:
        return
    columns: dict[str, list[Number | None]] = {
        "steps": [t.steps for t in trainings],
        "first loss": [t.first_loss for t in trainings],
        "last loss": [t.last_loss for t in trainings],
        "mean loss": [t.mean_loss for t in trainings],
        "grad norm": [t.mean_grad_norm for t in trainings],
        "tokens/s": [t.tokens_per_s for t in trainings],
        "GPU GiB": [t.peak_gpu_gib for t in trainings],
        "host GiB": [t.peak_host_gib for t in trainings],
    }
    shown = {title: values for title, values in columns.items() if any(value is not None for value in values)}
    yield "training (grad norm, tokens/s: means over the steps; GiB: the most)"
    body = [[str(t.round), t.stage, *(cell(values[at]) for values in shown.values())] for at, t in enumerate(trainings)]
    yield from grid(["round", "stage", *shown], body, left=(1,))
    for training in trainings:
        if training.memory_notches:
            yield f"  {lowered(training)}"


def lowered(training: Training) -> str:
    """That a training ended with less in a forward pass than the config says, since memory had run out."""
    often = "once" if training.memory_notches == 1 else f"{training.memory_notches} times"
    return (
        f"round {training.round} {training.stage}: after running out of memory {often}, per_device_batch_size "
        f"{training.per_device_batch_size} and gradient_accumulation_steps {training.gradient_accumulation_steps}; "
        "an optimizer step is the same"
    )


def _troubles(report: Report) -> Iterator[str]:
    if report.went_without or report.troubles:
        yield "what did not go well at once"
    for one in report.went_without:
        yield f"  round {one.round} {one.stage}: {one.how}, and the run went on: {_cut(one.reason)}"
    for trouble in report.troubles:
        yield f"  round {trouble.round} {trouble.stage}: {_ends(trouble)}"
        if trouble.last_error or trouble.log:
            yield f"      the last one: {_cut(trouble.last_error) or 'nothing'} (log: {trouble.log})"


def _ends(trouble: Trouble) -> str:
    attempts = f"{trouble.attempts} attempt{'' if trouble.attempts == 1 else 's'}"
    ends = ", ".join(f"{number} {outcome}" for outcome, number in sorted(trouble.ends.items()))
    return f"{attempts}; ended otherwise than well: {ends}" if ends else attempts


def _costs(report: Report) -> Iterator[str]:
    if not report.costs:
        return
    yield "cost by stage, all attempts (wall: summed over processes; memory: of the largest one)"
    body = [
        [
            cost.stage, duration(cost.wall_s), duration(cost.cpu_s), duration(cost.gpu_s), str(cost.processes),
            size(cost.peak_memory_bytes) if cost.peak_memory_bytes else "-",
        ]
        for cost in report.costs
    ]  # fmt: skip
    totals = (sum(getattr(cost, name) for cost in report.costs) for name in ("wall_s", "cpu_s", "gpu_s"))
    body.append(["all", *map(duration, totals), str(sum(cost.processes for cost in report.costs)), ""])
    yield from grid(["stage", "wall", "CPU", "GPU", "processes", "memory"], body, left=(0,))


def _storage(report: Report) -> Iterator[str]:
    total = sum(folder.bytes for folder in report.storage)
    free = f"; {size(report.free_bytes)} are free on that file system" if report.free_bytes is not None else ""
    yield f"storage: {size(total)} in the workspace{free}"
    yield from grid(
        ["folder", "files", "size"], [[f.name, str(f.files), size(f.bytes)] for f in report.storage], left=(0,)
    )


def _damaged(damaged: Sequence[str]) -> Iterator[str]:
    if damaged:
        yield "what could not be read, and is not in these numbers"
        yield from (f"  {line}" for line in damaged)


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> Iterator[str]:
    """Lines of a table; columns are as wide as what is in them, numbers to the right."""
    widths = [max(len(row[at]) for row in (titles, *rows)) for at in range(len(titles))]
    for row in (titles, *rows):
        cells = (f"{c:<{w}}" if at in left else f"{c:>{w}}" for at, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield f"  {'  '.join(cells)}".rstrip()


def cell(value: Number | None) -> str:
    """A number in a table: counts as they are, shares and losses to three digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _cut(error: str) -> str:
    return error if len(error) <= LONGEST_ERROR else error[:LONGEST_ERROR] + " …"
