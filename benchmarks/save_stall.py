"""Measure what checkpoints cost training: steps with a save in every 100 against steps without.

    OMP_NUM_THREADS=1 python benchmarks/save_stall.py [--blocks 6] [--out benchmarks/results/save_stall.json]

The quickstart's model, optimizer and batch. Blocks of 100 steps alternate: one with a save in the background
after its first step, one without, one with a save in the foreground. Given are medians of the blocks' times,
their ratios, and what the training thread itself waits for (the copy, and the one before if it is not done).
Ratios within one run; absolute times are of the machine.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from relora.data.prepare import prepare
from relora.train.parallel import processes
from relora.train.phase import Plan
from relora.train.recipe_io import load_recipe
from relora.train.reporting import Reporter
from relora.train.run_folder import OpenedRun
from relora.train.saving import Saver
from relora.train.setup import at_low_rank, build_model, build_state
from relora.train.state import versions
from relora.train.step import train_step_

ROOT = Path(__file__).parents[1]
STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6, help="of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "save_stall.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(Path(scratch), arguments.blocks)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measured(folder: Path, blocks: int) -> dict[str, Any]:
    recipe = load_recipe("quickstart")
    data = prepare(recipe.data)
    plan = Plan(recipe=recipe)
    times: dict[str, list[float]] = {"without": [], "background": [], "foreground": []}
    waits: dict[str, list[float]] = {"background": [], "foreground": []}
    with processes("auto") as here:
        state = build_state(build_model(recipe, data), plan, here, low_rank=False)
        at_low_rank(state, plan)
        state.relora = None  # the calendar is not what is measured
        batch = torch.randint(0, data.vocab_size, (recipe.train.batch_size, recipe.data.seq_len))
        savers = {}
        for kind in waits:
            config = replace(recipe.checkpoint, background=kind == "background")
            opened = OpenedRun(
                folder=folder / kind,
                recipe=replace(recipe, checkpoint=config),
                resume_from=None,
                notes=(),
            )
            opened.folder.mkdir()
            savers[kind] = Saver(opened, plan, here, Reporter(opened, plan, state, here), precision="fp32")
        for block in range(3 * blocks + 1):
            kind = list(times)[block % 3] if block else "warm-up"
            begun = time.perf_counter()
            for index in range(STEPS):
                state.progress.step += 1
                step(state, batch, here, recipe)
                if index == 0 and kind in savers:
                    asked = time.perf_counter()
                    savers[kind].save(state, fingerprint="")
                    waits[kind].append(time.perf_counter() - asked)
                if kind in savers:
                    savers[kind].check()
            if kind in times:
                times[kind].append(time.perf_counter() - begun)
        for saver in savers.values():
            saver.finish()
        size = sum(f.stat().st_size for f in max((folder / "background").rglob("step-*")).iterdir())
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "save_every": STEPS,
        "checkpoint_bytes": size,
        "block_s": {kind: [round(value, 3) for value in values] for kind, values in times.items()},
        "median_block_s": medians,
        "slowdown_background": medians["background"] / medians["without"] - 1,
        "slowdown_foreground": medians["foreground"] / medians["without"] - 1,
        "training_thread_waits_s": {kind: statistics.median(values) for kind, values in waits.items()},
        "stall_background": statistics.median(waits["background"]) / medians["without"],
        "stall_foreground": statistics.median(waits["foreground"]) / medians["without"],
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
    }


def step(state: Any, batch: torch.Tensor, here: Any, recipe: Any) -> None:
    train_step_(
        state.model,
        state.optimizer,
        batch,
        here,
        step=state.progress.step,
        seed=0,
        micro_batch_size=recipe.train.micro_batch_size,
        precision="fp32",
        clip_grad_norm=1.0,
    )


if __name__ == "__main__":
    main()
