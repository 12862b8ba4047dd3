"""Sweep the quickstart: learning rates of each phase and scale of the factors, for full, lora and relora.

    python experiments/quickstart/sweep.py WORK [--stage full factors cold ...] [--only NAME ...] [--jobs 2]

Every cell is the shipped recipe with overrides, trained by `relora train` in a process of one thread;
finished cells are not run again. Cells that share seed and full-rank learning rates share their warm
start: it is trained once, and the others resume from its last checkpoint, which gives the same bits as
training it again. Results are written to results.json beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from cells import CELLS, Cell

import relora.lab.methods  # noqa: F401 - their names are known from here on
from relora.train.config import Recipe
from relora.train.recipe_io import load_recipe, write_recipe
from relora.train.run_folder import note_origin
from relora.train.state import versions

RESULTS = Path(__file__).parent / "results.json"


def recipe_of(cell: Cell, work: Path) -> Recipe:
    """Return the quickstart with a cell's overrides."""
    recipe = load_recipe("quickstart", cell.overrides)
    return replace(recipe, run=replace(recipe.run, name=cell.name, out=work, seed=cell.seed))


def donor_of(cell: Cell, recipe: Recipe, work: Path) -> Path | None:
    """Return the folder of another cell whose warm start is this one's and is done, if there is any."""
    step = f"step-{recipe.relora.warm_start_steps:08d}"
    same = [other for other in CELLS if other.warm_start == cell.warm_start and other.has_warm_start]
    folders = [work / other.name for other in same if other != cell and cell.has_warm_start]
    return next((folder for folder in folders if (folder / "checkpoints" / step).is_dir()), None)


def share_warm_start(cell: Cell, recipe: Recipe, work: Path) -> None:
    """Begin a cell from the warm start of another, if there is any."""
    donor, folder = donor_of(cell, recipe, work), recipe.run.folder
    if donor is None or folder.exists():
        return
    step = f"step-{recipe.relora.warm_start_steps:08d}"
    for part in ("model", "tokenizer", f"checkpoints/{step}"):
        shutil.copytree(donor / part, folder / part)
    shutil.copy2(donor / "metrics.jsonl", folder / "metrics.jsonl")
    note_origin(folder, donor, step)
    write_recipe(recipe, folder / "recipe.toml")


def train(cell: Cell, work: Path) -> None:
    """Train a cell to its end in a process of its own."""
    recipe = recipe_of(cell, work)
    summary = recipe.run.folder / "summary.json"
    if not summary.is_file():
        share_warm_start(cell, recipe, work)
        path = work / f"{cell.name}.toml"
        write_recipe(recipe, path)
        with (work / f"{cell.name}.log").open("w") as log:
            command = [sys.executable, "-m", "relora", "train", str(path)]
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if not summary.is_file():
        print(f"{cell.name}: failed, see {work / cell.name}.log", flush=True)
        return
    result = json.loads(summary.read_text())
    print(f"{cell.name}: {result['eval/loss']:.4f}, perplexity {result['eval/perplexity']:.2f}", flush=True)


def collect(work: Path) -> list[dict[str, object]]:
    """Gather the finished cells: those here, and those of earlier starts that results.json holds."""
    earlier = json.loads(RESULTS.read_text())["cells"] if RESULTS.is_file() else []
    rows = {row["cell"]: row for row in earlier}
    kept = ("eval/loss", "eval/perplexity", "wall_s", "tokens", "parameters_trainable", "restarts", "ranks")
    for cell in CELLS:
        path = work / cell.name / "summary.json"
        if path.is_file():
            summary = json.loads(path.read_text())
            row = {"cell": cell.name, "arm": cell.arm, "seed": cell.seed, "overrides": cell.overrides}
            switch = (summary["switch"] or {}).get("eval/loss")
            curve = {"curve": heldout_curve(work / cell.name)}
            rows[cell.name] = row | {key: summary[key] for key in kept} | {"switch_loss": switch} | curve
    return list(rows.values())


def heldout_curve(folder: Path) -> list[tuple[int, float]]:
    """Return (step, held-out loss) wherever a run was evaluated."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], round(line["eval/loss"], 5)) for line in lines if "eval/loss" in line]


def main() -> None:
    """Train what is asked for, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stage", nargs="*", default=["full"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--jobs", type=int, default=2, help="cells that train at once")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    chosen = [cell for cell in CELLS if cell.stage in arguments.stage]
    if arguments.only:
        chosen = [cell for cell in CELLS if cell.name in arguments.only]
    work = arguments.work
    without = [c for c in chosen if c.has_warm_start and donor_of(c, recipe_of(c, work), work) is None]
    first = {cell.warm_start: cell for cell in reversed(without)}
    donors = [c for c in chosen if c in first.values() or not c.has_warm_start]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda cell: train(cell, arguments.work), donors))
        list(pool.map(lambda cell: train(cell, arguments.work), [c for c in chosen if c not in donors]))
    results = {"versions": versions(), "cells": collect(arguments.work)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
