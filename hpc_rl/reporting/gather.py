"""Reading a run into a `Report`. A part that is absent or damaged is left out, and named; the others are there."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_rl import recipes
from hpc_rl.cluster.entry import EndRecord
from hpc_rl.cluster.failures import Outcome
from hpc_rl.orchestrate import overview
from hpc_rl.orchestrate.graph import Kind, Stage, StageId
from hpc_rl.orchestrate.overview import QUIET
from hpc_rl.orchestrate.reconcile import Run, end_paths, look
from hpc_rl.orchestrate.sampled import summarise
from hpc_rl.recipes.columns import Column, Folding, Number, Table
from hpc_rl.reporting import clock
from hpc_rl.reporting.data import Cost, Report, Rows, Sampled, Training, Trend, Trouble, WentWithout
from hpc_rl.reporting.storage import folders
from hpc_rl.run import manifest
from hpc_rl.run.atomic import CorruptFile
from hpc_rl.run.ledger import History, Ledger
from hpc_rl.run.manifest import StoredManifest
from hpc_rl.status import Reader


@dataclass
class _Found:
    """What was read on the way: each file once."""

    run: Run
    history: History
    ends: dict[StageId, list[EndRecord]] = field(default_factory=dict)
    folded: dict[tuple[int, Column], Folding] = field(default_factory=dict)
    about: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    trainings: list[Training] = field(default_factory=list)
    went_without: list[WentWithout] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def damage(self, text: str) -> None:
        if text not in self.damaged:
            self.damaged.append(text)


def gather(run: Run) -> Report:
    """The report of a run as it stands. It asks Slurm once, and changes nothing."""
    found = _Found(run, Ledger(run.ws).history())
    if found.history.skipped_lines:
        found.damage(f"{run.ws.ledger_path}: {found.history.skipped_lines} lines cannot be read")
    for stage in run.graph.stages:
        found.ends[stage.id] = list(_ends(found, stage.id))
    tables: tuple[Table, ...] = getattr(recipes.load(run.config.recipe), "REPORT", ())
    for stage in run.graph.work:
        _read_manifests(found, stage, tables)
    status, reason, queued = _status(found)
    return Report(
        name=run.config.run.name,
        workspace=str(run.ws.root),
        recipe=run.config.recipe,
        status=status,
        reason=reason,
        rounds_done=sum(_round_is_done(run, round) for round in range(1, run.graph.rounds + 1)),
        rounds_planned=run.graph.rounds,
        times=clock.times(run, found.history, found.ends, status, time.time()),
        tables=tuple(rows for table in tables if (rows := _fill_in(found, table)).shown),
        trainings=tuple(found.trainings),
        went_without=tuple(found.went_without),
        troubles=tuple(_troubles(found, queued)),
        costs=tuple(_costs(found)),
        storage=folders(run.ws.root, found.notes.append),  # the caches of a run are its owner's alone
        free_bytes=shutil.disk_usage(run.ws.root).free,
        sampling=tuple(_sampling(found)),
        damaged=tuple(found.damaged),  # last: the lines above add to it
        notes=tuple(found.notes),
    )


def _status(found: _Found) -> tuple[str, str, frozenset[str]]:
    """Status and reason as `status` shows them, and the names of what is queued."""
    reader = Reader(found.run)
    try:
        view = look(found.run, reader, found.history)
    except CorruptFile as error:
        found.damage(str(error))
        return "unknown", "a file that says it is damaged", frozenset(a.name for a in found.history.attempts)
    if reader.note:
        found.notes.append(reader.note)
    shown = overview.build(view)
    return shown.status, shown.reason, frozenset(job.name for job in view.queue)


def _round_is_done(run: Run, round: int) -> bool:
    return all(_is_done(run, stage) for stage in run.graph.of_round(round) if stage.has_work)


def _is_done(run: Run, stage: Stage) -> bool:
    return len(manifest.done_shards(run.ws, stage.round, stage.name)) >= stage.shards


def _ends(found: _Found, id: StageId) -> Iterator[EndRecord]:
    for path in end_paths(found.run.ws, id):
        try:
            yield EndRecord.read(path)
        except CorruptFile as error:
            found.damage(str(error))


def _read_manifests(found: _Found, stage: Stage, tables: Sequence[Table]) -> None:
    """A stage's manifests, one after the other; those of arrays only where a column wants them."""
    columns = [column for table in tables for column in table.columns if column.stage == stage.name]
    is_about = any(table.about_stage == stage.name for table in tables)
    if not (columns or is_about) and stage.kind is Kind.ARRAY:
        return
    ws = found.run.ws
    for shard in sorted(manifest.done_shards(ws, stage.round, stage.name)):
        try:
            made = manifest.read(ws, stage.round, stage.name, shard)
        except CorruptFile as error:
            found.damage(str(error))
            continue
        for column in columns:
            found.folded.setdefault((stage.round, column), Folding(column)).add(made.metrics)
        if is_about:
            found.about.setdefault(stage.round, {})[stage.name] = dict(made.metrics)
        reasons = [(key, made.made_from[key]) for key in ("given_up", "nothing_to_learn") if key in made.made_from]
        for key, reason in reasons:
            found.went_without.append(WentWithout(stage.round, stage.name, key.replace("_", " "), str(reason)))
        if not reasons and stage.kind is Kind.MULTINODE and "steps" in made.metrics:
            found.trainings.append(_training(made))


def _training(made: StoredManifest) -> Training:
    numbers = made.metrics
    return Training(
        round=made.round,
        stage=made.stage,
        steps=numbers.get("steps"),
        first_loss=numbers.get("first_loss"),
        last_loss=numbers.get("last_loss"),
        mean_loss=numbers.get("mean_loss"),
        mean_grad_norm=numbers.get("mean_grad_norm"),
        tokens_per_s=numbers.get("mean_tokens_per_s"),
        peak_gpu_gib=numbers.get("peak_gpu_gib"),
        peak_host_gib=numbers.get("peak_host_gib"),
        memory_notches=numbers.get("memory_notches") or 0,
        per_device_batch_size=numbers.get("per_device_batch_size"),
        gradient_accumulation_steps=numbers.get("gradient_accumulation_steps"),
    )


def _fill_in(found: _Found, table: Table) -> Rows:
    rows: dict[int, dict[str, Number]] = {}
    for round in range(found.run.graph.rounds + 1):
        for column in table.columns:
            folding = found.folded.get((round, column))
            if folding is not None and folding.value is not None:
                rows.setdefault(round, {})[column.title] = folding.value
    shown = tuple(column.title for column in table.columns if any(column.title in row for row in rows.values()))
    trends = []
    for column in table.columns:
        having = [round for round, row in rows.items() if column.title in row]
        if column.trend and len(having) > 1:
            first, last = having[0], having[-1]
            trends.append(Trend(column.title, first, rows[first][column.title], last, rows[last][column.title]))
    return Rows(table, _about(found, table), shown, rows, tuple(trends))


def _about(found: _Found, table: Table) -> str:
    for round in sorted(found.about, reverse=True):
        try:
            return table.about.format_map(found.about[round].get(table.about_stage, {}))
        except KeyError:
            continue
    return ""


def _troubles(found: _Found, queued: frozenset[str]) -> Iterator[Trouble]:
    for stage in found.run.graph.stages:
        if stage.kind is Kind.CONTROL:
            continue
        attempts = [a for a in found.history.of(stage.round, stage.name) if not (a.written_off or a.cancelled)]
        ends = sorted(found.ends[stage.id], key=lambda end: end.ended)
        bad = [end for end in ends if end.outcome != Outcome.DONE.value]
        if stage.kind is Kind.SERVICE:  # told to leave when those are done whom it serves
            bad = [end for end in bad if end.outcome not in QUIET]
        elif stage.has_work and attempts and _is_done(found.run, stage):  # its last jobs had nothing left to do
            bad = [end for end in bad if end.name != attempts[-1].name or end.outcome not in QUIET]
        counts = Counter(end.outcome for end in bad)
        heard_of = {end.name for end in ends} | queued
        # in the launcher's own process (debug) there is no entry process that would leave a word
        lost = [a for a in attempts if a.job_ids and a.executor != "debug" and a.name not in heard_of]
        if lost and stage.has_work:
            counts[Outcome.LOST.value] += len(lost)
        if counts or (len(attempts) > 1 and stage.has_work):
            loud = [end for end in bad if end.outcome not in QUIET]
            last = loud[-1] if loud else None
            yield Trouble(
                stage.round, stage.name, len(attempts), dict(counts),
                last.error if last else "", last.log if last else "",
            )  # fmt: skip


def _costs(found: _Found) -> Iterator[Cost]:
    by_name: dict[str, list[EndRecord]] = {}
    for id, ends in found.ends.items():
        by_name.setdefault(id.name, []).extend(ends)
    for name, ends in by_name.items():
        if ends:
            yield Cost(
                stage=name,
                processes=len(ends),
                wall_s=sum(end.ended - end.started for end in ends),
                cpu_s=sum(end.cpu_s for end in ends),
                gpu_s=sum(end.gpu_s for end in ends),
                peak_memory_bytes=max((e.peak_memory_bytes for e in ends if e.peak_memory_bytes), default=None),
            )


def _sampling(found: _Found) -> Iterator[Sampled]:
    for stage in found.run.graph.work:
        try:
            sampled = summarise(found.run.ws, stage, found.ends[stage.id])
        except CorruptFile as error:
            found.damage(str(error))
            continue
        if sampled is not None:
            yield Sampled(stage.round, stage.name, sampled)
