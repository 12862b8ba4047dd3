"""Measure what a checkpoint costs training, on the quickstart's model, optimizer and batch.

    OMP_NUM_THREADS=1 python benchmarks/save_stall.py [--json FILE] [--blocks 3]

Blocks of 12 steps alternate: one without a save, one with a save in the background after its first step,
one with a save in the foreground. What a block with a save takes longer than one without is what the save
costs in all (the copy, and what its thread takes of the machine); it is given as a share of 100 steps. Given
as well is how long the training thread stands still. Ratios within one run; times are of the machine.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import arguments, publish

from relora.data.prepare import prepare
from relora.train.config import Recipe
from relora.train.loss import TokenLoss
from relora.train.methods import load_method
from relora.train.parallel import processes
from relora.train.phase import Plan
from relora.train.recipe_io import load_recipe
from relora.train.reporting import Reporter
from relora.train.run_folder import OpenedRun
from relora.train.saving import Saver
from relora.train.setup import at_low_rank, build_model, build_state
from relora.train.step import train_step_

STEPS = 12
SAVE_EVERY = 100


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, default=3, help="of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = load_recipe("quickstart", tiny(folder) if options.quick else None)
        result = measured(recipe, folder, 1 if options.quick else options.blocks)
    publish("save_stall", result, options)


def tiny(folder: Path) -> dict[str, dict[str, object]]:
    return {
        "data": {
            "vocab_size": 512,
            "max_bytes": 400_000,
            "heldout_fraction": 0.3,
            "seq_len": 32,
            "cache_dir": str(folder / "cache"),
        },
        "relora": {"rank": 4},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
    }


def measured(recipe: Recipe, folder: Path, blocks: int) -> dict[str, Any]:
    data = prepare(recipe.data)
    plan = Plan(recipe=recipe)
    times: dict[str, list[float]] = {"without": [], "background": [], "foreground": []}
    waits: dict[str, list[float]] = {"background": [], "foreground": []}
    with processes("auto") as here, ExitStack() as opened_files:
        method = load_method(recipe.run.method)(plan)
        state = build_state(build_model(recipe, data), method, here, low_rank=False)
        at_low_rank(state)
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
            reporter = Reporter(opened, plan, state, here)
            opened_files.callback(reporter.close)
            savers[kind] = Saver(opened, plan, here, reporter, precision="fp32")
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
                savers[kind].finish()
            if kind in times:
                times[kind].append(time.perf_counter() - begun)
        size = sum(f.stat().st_size for f in max((folder / "background").rglob("step-*")).iterdir())
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    hundred = medians["without"] / STEPS * SAVE_EVERY
    return {
        "save_every": SAVE_EVERY,
        "checkpoint_bytes": size,
        "step_s": medians["without"] / STEPS,
        "block_s": {kind: [round(value, 3) for value in values] for kind, values in times.items()},
        "training_thread_waits_s": {kind: statistics.median(values) for kind, values in waits.items()},
        "stall": {kind: statistics.median(values) / hundred for kind, values in waits.items()},
        "cost_in_all": {kind: (medians[kind] - medians["without"]) / hundred for kind in waits},
    }


def step(state: Any, batch: torch.Tensor, here: Any, recipe: Any) -> None:
    train_step_(
        TokenLoss(state.model, chunk_tokens=None),
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
