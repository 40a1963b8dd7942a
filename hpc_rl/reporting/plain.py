"""A report as JSON holds it. Seconds and bytes throughout; a number that is none (NaN) is null."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from hpc_rl.reporting.data import Report, Rows, Sampled


def to_plain(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    plain = {
        "name": report.name,
        "workspace": report.workspace,
        "recipe": report.recipe,
        "status": report.status,
        "reason": report.reason,
        "rounds_done": report.rounds_done,
        "rounds_planned": report.rounds_planned,
        "times": asdict(report.times),
        "gpu_hours": report.gpu_hours,
        "tables": [_table(rows) for rows in report.tables],
        "trainings": [asdict(training) for training in report.trainings],
        "went_without": [asdict(one) for one in report.went_without],
        "troubles": [asdict(trouble) for trouble in report.troubles],
        "costs": [asdict(cost) for cost in report.costs],
        "storage": [asdict(folder) for folder in report.storage],
        "free_bytes": report.free_bytes,
        "sampling": [_sampled(sampled) for sampled in report.sampling],
        "damaged": list(report.damaged),
        "notes": list(report.notes),
    }
    finite: dict[str, Any] = _finite(plain)
    return finite


def _table(rows: Rows) -> dict[str, Any]:
    columns = [column for column in rows.table.columns if column.title in rows.shown]
    return {
        "title": rows.table.title,
        "about": rows.about,
        "columns": [{"title": c.title, "stage": c.stage, "metric": c.metric, "note": c.note} for c in columns],
        "rounds": [{"round": round, **numbers} for round, numbers in rows.rows.items()],
        "trends": [asdict(trend) for trend in rows.trends],
    }


def _sampled(sampled: Sampled) -> dict[str, Any]:
    found = sampled.summary
    return {
        "round": sampled.round,
        "stage": sampled.stage,
        "tasks": found.tasks,
        "running": found.running,
        "ends": dict(found.ends),
        "prompts": found.published.prompts,
        "tokens": found.published.tokens,
        "lost_tokens": found.lost_tokens,
        "wall_s": found.wall_s,
        "gpu_s": found.gpu_s,
        **found.to_scalars(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
