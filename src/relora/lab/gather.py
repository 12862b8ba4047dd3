"""study.json: everything a table needs, from the run folders; and the curves, thinned."""

import itertools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from relora.lab.cell_files import CellFiles
from relora.lab.plan import Outcome, WorkPlan
from relora.lab.study import Budget, Cell, Study, recipe_fields
from relora.report.run import read_run
from relora.train.state import versions

FORMAT = 1
_CURVE_POINTS = 120
_MEASURED = (
    *("steps", "tokens", "parameters_total", "parameters_trainable", "weight_bytes", "optimizer_bytes"),
    *("wall_s", "tokens_per_s", "peak_memory_bytes", "restarts", "ranks", "switch", "method_facts"),
    *("eval_split", "device", "versions"),
)


def study_results(
    study: Study,
    plan: WorkPlan,
    outcomes: Mapping[str, Outcome],
    *,
    threads: int,
    data: Sequence[Mapping[str, Any]] = (),
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a study and its cells as JSON values.

    Args:
        study: The study.
        plan: Its cells.
        outcomes: How they ended.
        threads: Of each cell.
        data: What was prepared, of each text.
        before: What study.json held: cells of it whose run folders are gone stay as they were.
    """
    known = {
        row["name"]: row | {"earlier": True} for row in (before or {}).get("cells", []) if _has_ended(row)
    }
    return {
        "format": FORMAT,
        "study": {
            "name": study.name,
            "question": study.question,
            "seeds": list(study.seeds),
            "tuning_seed": study.tuning_seed,
            "search": study.search,
            "references": list(study.references),
            "budgets": [budget.label for budget in study.budgets],
            "tuning_budget": None if study.tuning_budget is None else study.tuning_budget.label,
            "arms": [
                {
                    "name": arm.name,
                    "method": arm.method,
                    "settings": dict(arm.settings),
                    "grid": {axis: list(values) for axis, values in arm.grid.items()},
                    "inherit": arm.inherit,
                    "references": dict(arm.references),
                }
                for arm in study.arms
            ],
            "source": study.source,
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads_per_cell": threads,
        },
        "versions": versions(),
        "data": list(data or (before or {}).get("data", [])),
        "notes": list(plan.notes),
        "cells": [
            _row(study, cell, outcomes.get(cell.name))
            if CellFiles(cell).outcome() is not None or cell.name not in known
            else known[cell.name]
            for cell in plan.cells
        ],
    }


def earlier_outcomes(results: Mapping[str, Any]) -> dict[str, Outcome]:
    """Return how the cells of study.json ended, by name, where running them again would end the same."""
    return {
        row["name"]: Outcome(
            loss=row["loss"] if row["status"] == "finished" else math.inf, failure=row.get("failure")
        )
        for row in results.get("cells", [])
        if _has_ended(row)
    }


def ended(cell: Cell, kept: Mapping[str, Outcome]) -> Outcome | None:
    """Return how a cell ended: by its run folder, else by what study.json kept; None if it has not."""
    return CellFiles(cell).outcome() or kept.get(cell.name)


def _has_ended(row: Mapping[str, Any]) -> bool:
    return row["status"] in ("finished", "diverged")


def _planned_row(study: Study, cell: Cell) -> dict[str, Any]:
    return {
        "name": cell.name,
        "arm": cell.arm,
        "stage": cell.stage,
        "budget": cell.budget.label,
        "serves": _budgets_served(study, cell),
        "seed": cell.seed,
        "swept": dict(cell.swept),
        "status": "missing",
    }


def _budgets_served(study: Study, cell: Cell) -> list[str]:
    """Return the lengths whose settings a tuning cell decides."""
    own: Sequence[Budget] = (cell.budget,)
    shared = cell.stage == "tuning" and study.tuning_budget is not None
    return [budget.label for budget in (study.budgets if shared else own)]


def _row(study: Study, cell: Cell, outcome: Outcome | None) -> dict[str, Any]:
    """Return a cell as its run folder has it."""
    row = _planned_row(study, cell)
    if outcome is None:
        return row
    files = CellFiles(cell)
    row["recipe"] = recipe_fields(cell.recipe)
    row["warm_start_from"] = files.shared_from()
    summary = files.summary()
    if summary is None or outcome.failure is not None:
        row["status"] = "diverged" if outcome.is_final else "failed"
        row["failure"] = outcome.failure
        return row
    row["status"] = "finished"
    row |= {name: summary.get(name) for name in _MEASURED}
    row |= {name: summary[f"eval/{name}"] for name in ("loss", "perplexity", "bits_per_byte")}
    row |= curves(cell)
    return row


def curves(cell: Cell) -> dict[str, Any]:
    """Return a run's curves: [tokens, wall_s, loss] where it was evaluated, [tokens, loss] of training.

    Time is summed from the speed that each logged line tells, which has evaluations in it.
    """
    evaluated: list[list[float]] = []
    trained: list[list[float]] = []
    wall_s, before = 0.0, 0.0
    for record in read_run(CellFiles(cell).run).metrics:
        tokens, speed = float(str(record["tokens"])), record.get("tokens_per_s")
        if isinstance(speed, float) and speed > 0:
            wall_s += (tokens - before) / speed
        before = tokens
        evaluation, loss = record.get("eval/loss"), record.get("train/loss")
        if isinstance(evaluation, float):
            evaluated.append([tokens, round(wall_s, 2), round(evaluation, 5)])
        if isinstance(loss, float):
            trained.append([tokens, round(loss, 4)])
    return {"eval_curve": evaluated, "train_curve": thinned(trained, most=_CURVE_POINTS)}


def thinned(points: Sequence[Sequence[float]], *, most: int) -> list[list[float]]:
    """Return a curve of at most so many points: means of neighbours, at the last one's place."""
    if len(points) <= most:
        return [list(point) for point in points]
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    groups = [points[low:high] for low, high in itertools.pairwise(edges)]
    return [[group[-1][0], round(sum(point[1] for point in group) / len(group), 4)] for group in groups]
