"""`relora compare`: a study from its file to its table, as a whole."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora.errors import ConfigError
from relora.lab.gather import earlier_outcomes, ended, study_results
from relora.lab.plan import Planner, predicted, wanted_cells
from relora.lab.report import RESULTS, read_results, write_results, write_tables
from relora.lab.runner import Observer, Runner
from relora.lab.study import Cell, Study
from relora.lab.texts import StudyTexts
from relora.train.signals import Requests, stopping_on_signals


def compare(
    study: Study,
    folder: Path,
    *,
    cores: int,
    threads_per_cell: int,
    environment: Mapping[str, str],
    observer: Observer,
    arms: Sequence[str] = (),
) -> tuple[dict[str, Any], int]:
    """Run what a study lacks, and write its results; the same call again goes on where it stands.

    Args:
        study: The study.
        folder: Where its cells and results are kept.
        cores: Threads of all cells together.
        threads_per_cell: Threads of each.
        environment: Of the training processes.
        observer: Told how it goes.
        arms: Which arms may train now, with the tuning of those they inherit from; none for all.

    Returns:
        What study.json holds, and the exit code.

    Raises:
        ConfigError: if the numbers of cores do not allow one cell, an arm is not there, or the folder's cells
            are of another text.
        DataError: if the text of the study cannot be prepared.
        CheckpointError: if the folder's study.json or data.json cannot be read or written.
    """
    if not 1 <= threads_per_cell <= cores:
        raise ConfigError(f"threads-per-cell must be from 1 to the {cores} cores, not {threads_per_cell}")
    requests = Requests()
    before = read_results(folder)
    with stopping_on_signals(requests):
        runner = Runner(
            study,
            folder,
            num_slots=cores // threads_per_cell,
            threads=threads_per_cell,
            environment=environment,
            observer=observer,
            requests=requests,
            earlier=before,
            is_wanted=wanted_cells(study, arms),
        )
        run = runner.run()
    results = study_results(
        study,
        run.plan,
        run.outcomes,
        threads=threads_per_cell,
        data=run.data,
        before=before,
    )
    write_results(folder, results)
    return results, run.exit_code


def tables_only(study: Study, folder: Path) -> dict[str, Any]:
    """Recompute table, page and plots: from the run folders where they are, else from study.json.

    Raises:
        ConfigError: if there is neither.
    """
    before = read_results(folder)
    kept = earlier_outcomes(before or {})
    if not (folder / "cells").is_dir():
        if before is None:
            raise ConfigError(
                f"{folder} holds neither cells nor {RESULTS}: run the study first, or give --out"
            )
        write_tables(folder, before)
        return before
    plan, outcomes = Planner(study, folder / "cells").plan_with(lambda cell: ended(cell, kept))
    threads = 1 if before is None else before["machine"]["threads_per_cell"]
    data = StudyTexts(folder).facts(plan.cells)
    results = study_results(study, plan, outcomes, threads=threads, data=data, before=before)
    write_results(folder, results)
    return results


def dry_run(
    study: Study, folder: Path, *, cores: int, threads_per_cell: int, arms: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the cells a study has, the tokens they train on, and how long that may take.

    A warm start that several cells share is counted once. Grids that may be extended are not.
    """
    is_wanted = wanted_cells(study, arms)
    cells = [cell for cell in predicted(study, folder / "cells") if is_wanted(cell)]
    seen: set[str] = set()
    listed = []
    for cell in cells:
        shared = cell.warm_start is not None and cell.warm_start in seen
        if cell.warm_start is not None:
            seen.add(cell.warm_start)
        skipped = (cell.recipe.switch_step or 0) * cell.recipe.tokens_per_step if shared else 0
        listed.append({**_described(cell), "tokens": cell.tokens - skipped, "shares_warm_start": shared})
    tokens = sum(row["tokens"] for row in listed)
    estimate = {}
    if study.tokens_per_s:
        hours = tokens / study.tokens_per_s / 3600
        slots = max(1, cores // threads_per_cell)
        estimate = {
            "cell_hours": round(hours, 2),
            f"hours_on_{cores}_cores": round(hours / slots, 2),
        }
    return {
        "study": study.name,
        "folder": str(folder),
        "num_cells": len(listed),
        "tokens": tokens,
        **estimate,
        "cells": listed,
    }


def _described(cell: Cell) -> dict[str, Any]:
    return {
        "arm": cell.arm,
        "stage": cell.stage,
        "budget": cell.budget.label,
        "seed": cell.seed,
        "swept": json.dumps(cell.swept) if cell.stage == "tuning" else "as won" if cell.swept else "",
    }
