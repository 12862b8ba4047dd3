"""Train the first steps of a cell of each committed study again, from its file, beside what it has recorded.

    python experiments/rerun.py [STUDY ...] [--steps 60] [--json FILE]

The cell is the final one that restarts first, or else of the study's last arm, trained as one thread by
itself; how often it had restarted, or that it was still at full rank, is said. On the text, the kind of
processor and the versions of the record its losses are the same to the four decimals that are recorded; on
others they part slowly. A study whose text is not at hand, or is another version, is named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from committed import HERE

from relora.errors import DataError
from relora.lab.gather import earlier_outcomes
from relora.lab.plan import Planner
from relora.lab.study import Cell
from relora.lab.study_file import read_study
from relora.lab.texts import data_facts
from relora.log.jsonl import read_jsonl
from relora.train.phase import Plan
from relora.train.recipe_io import write_recipe

_POLL_S = 0.5


def chosen(content: dict[str, Any], cells: list[Cell]) -> Cell:
    """Return the cell to train again: it is planned from the study's file, and finished in its results."""
    finished = {row["name"] for row in content["cells"] if row["status"] == "finished"}
    final = [cell for cell in cells if cell.stage == "final" and cell.name in finished]
    restarting = [cell for cell in final if cell.recipe.spec.restarts]
    return min(restarting, key=first_restart) if restarting else final[-1]


def first_restart(cell: Cell) -> int:
    """Return the step after which a cell restarts for the first time."""
    return (cell.recipe.switch_step or 0) + cell.recipe.relora.restart_every


def how_far(cell: Cell, step: int) -> str:
    """Say what of a cell its first steps have been."""
    if step <= (cell.recipe.switch_step or 0):
        return "full rank"
    restarts = sum(at <= step for at in Plan(recipe=cell.recipe).restart_steps)
    return f"low rank, {restarts} restart{'' if restarts == 1 else 's'}"


def row_of(content: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Return what a study's results hold of a cell."""
    (row,) = (row for row in content["cells"] if row["name"] == cell.name)
    return row


def recorded(content: dict[str, Any], cell: Cell, last_step: int) -> dict[int, float]:
    """Return the losses of a cell's training that its results hold, by step; of a long run, means."""
    by_step = {
        round(tokens / cell.recipe.tokens_per_step): loss
        for tokens, loss in row_of(content, cell)["train_curve"]
    }
    return {step: loss for step, loss in by_step.items() if step <= last_step}


def trained_again(cell: Cell, folder: Path, last_step: int) -> dict[int, float]:
    """Train a cell until it has logged a step, stop it, and return its losses by step.

    Raises:
        RuntimeError: if training ended by itself, with what it said.
    """
    recipe = replace(cell.recipe, run=replace(cell.recipe.run, out=folder))
    path, metrics = folder / "cell.toml", folder / cell.name / "metrics.jsonl"
    write_recipe(recipe, path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, "-m", "relora", "train", str(path)]
        training = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    try:
        while training.poll() is None and last_step > max(losses_of(metrics), default=0):
            time.sleep(_POLL_S)
    finally:
        training.terminate()
        training.wait()
    losses = losses_of(metrics)
    if last_step > max(losses, default=0):
        raise RuntimeError((folder / "said.txt").read_text()[-2000:])
    return losses


def losses_of(metrics: Path) -> dict[int, float]:
    """Return the training losses of metrics.jsonl, by step."""
    rows = read_jsonl(metrics).records if metrics.is_file() else ()
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def as_recorded(losses: dict[int, float], steps: Sequence[int]) -> dict[int, float]:
    """Return the means of losses from one of some steps to the next, as results of long runs hold them."""
    return {
        step: fmean(loss for at, loss in losses.items() if before < at <= step)
        for before, step in pairwise([0, *steps])
    }


def compared(study: Path, last_step: int) -> dict[str, Any]:
    """Return what came of the cell of a study's folder, in numbers.

    Raises:
        DataError: if its text is not here.
    """
    content = json.loads((study / "results" / "study.json").read_text(encoding="utf-8"))
    kept = earlier_outcomes(content)
    with tempfile.TemporaryDirectory() as folder:
        plan, _ = Planner(read_study(study / "study.toml"), Path(folder)).plan_with(
            lambda cell: kept.get(cell.name)
        )
        cell = chosen(content, plan.cells)
        if data_facts(cell)["fingerprint"] not in {facts["fingerprint"] for facts in content["data"]}:
            raise DataError("its text is another version here")
        before = recorded(content, cell, last_step)
        if not before:
            raise DataError(f"its results hold no loss of the first {last_step} steps")
        again = as_recorded(trained_again(cell, Path(folder), max(before)), sorted(before))
    return {
        "study": study.name,
        "cell": cell.name,
        "recorded_on": row_of(content, cell)["device"],
        "steps": len(before),
        "last_step": max(before),
        "of": how_far(cell, max(before)),
        "largest_difference": max(abs(again[step] - loss) for step, loss in before.items()),
    }


def main() -> None:
    """Print a line for each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("studies", nargs="*")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    studies = arguments.studies or sorted(path.parents[1].name for path in HERE.glob("*/results/study.json"))
    found, left_out = [], {}
    print("| study | cell | recorded on | losses compared, to step | of | largest difference, nats |")
    print("|---|---|---|---|---|---|")
    for study in studies:
        try:
            row = compared(HERE / study, arguments.steps)
        except DataError as error:
            left_out[study] = str(error)
            continue
        found.append(row)
        steps = f"{row['steps']}, {row['last_step']}"
        difference = f"{row['largest_difference']:.5f}"
        print(
            f"| {study} | {row['cell']} | {row['recorded_on']} | {steps} | {row['of']} | {difference} |",
            flush=True,
        )
    for study, reason in left_out.items():
        print(f"{study}: left out: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cells": found, "left_out": left_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
