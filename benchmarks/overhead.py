"""Measure what the trainer takes of a step besides forward, backward and update.

    python benchmarks/overhead.py [--json FILE] [--steps 40]

The real trainer trains, with evaluations and saves off (the last step has both and is not counted). Clocks
stand around forward, backward, the optimizer's step, clipping, and what the method does between (observing
the gradient, restarts, the residual's step, which are its own work). What is left of a step's period,
batches, logs, progress and bookkeeping, is the trainer's overhead. Clipping is part of the update in every
trainer; it is given apart, and the stricter share that counts it as overhead as well.

The quickstart as it is, cold, with a cycle of 10 steps; the same at full rank; and a LLaMA of 9 M parameters
(vocab_size 32100) with small batches. A smaller step only makes the share larger.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import arguments, bar, note, publish, quartiles
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from relora.train.config import Recipe
from relora.train.fit import fit
from relora.train.loss import TokenLoss
from relora.train.recipe_io import load_recipe
from relora.train.trainer import Trainer
from relora.train.training_method import Restarting, TrainingMethod

WARMUP = 5
LIMIT = 0.03
Layer = dict[str, dict[str, object]]
CASES: dict[str, tuple[str, Layer]] = {
    "quickstart": ("quickstart", {"relora": {"warm_start_steps": 0, "restart_every": 10}}),
    "quickstart, full rank": ("quickstart", {"run": {"method": "full"}}),
    "llama-9m": (
        "llama-9m",
        {
            "relora": {"warm_start_steps": 0, "restart_every": 10},
            "train": {"batch_size": 8, "micro_batch_size": 8},
        },
    ),
}
TINY: Layer = {
    "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "data": {"vocab_size": 512, "max_bytes": 400_000, "heldout_fraction": 0.3, "seq_len": 32},
    "relora": {"rank": 4, "warm_start_steps": 0, "restart_every": 4},
}
WORK = ("forward", "backward", "optimizer", "clip", "method")


class Clocks:
    """The moments at which steps began, and the seconds of each by what they went into."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.spent: list[Counter[str]] = []
        self._optimizer_begun = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put the clocks into the trainer for a while."""
        with ExitStack() as clocks:
            for owner, name, label in (
                (TokenLoss, "forward", "forward"),
                (Tensor, "backward", "backward"),
                (torch.nn.utils, "clip_grad_norm_", "clip"),
                (TrainingMethod, "after_backward", "method"),
                (TrainingMethod, "after_step", "method"),
                (Restarting, "after_step", "method"),
            ):
                clocks.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), label)))
            clocks.enter_context(patch.object(Trainer, "_step", self._noted(Trainer._step)))
            clocks.callback(register_optimizer_step_pre_hook(self._before_update).remove)
            clocks.callback(register_optimizer_step_post_hook(self._after_update).remove)
            yield

    def seconds(self, *, after: int) -> list[dict[str, float]]:
        """Return what each step took, all of it under "period", without the first ones and the last."""
        periods = [end - begin for begin, end in pairwise(self.begun)]
        return [{**spent, "period": all_} for spent, all_ in zip(self.spent, periods, strict=False)][after:]

    def _noted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*args: Any) -> Any:
            self.begun.append(time.perf_counter())
            self.spent.append(Counter())
            return step(*args)

        return begun

    def _timed(self, run: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = run(*args, **kwargs)
            if self.spent:
                self.spent[-1][label] += time.perf_counter() - begun
            return result

        return timed

    def _before_update(self, *_: Any) -> None:
        self._optimizer_begun = time.perf_counter()

    def _after_update(self, *_: Any) -> None:
        self.spent[-1]["optimizer"] += time.perf_counter() - self._optimizer_begun


def recipe_of(name: str, changes: Layer, folder: Path, *, steps: int) -> Recipe:
    """Return a recipe that neither evaluates nor saves before its last step, and stays on its first rates."""
    quiet: Layer = {
        "run": {"out": str(folder)},
        "schedule": {"warmup_steps": 2, "rewarmup_steps": 0},
        "train": {"steps": steps},
        "eval": {"every": 0, "sequences": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 10},
    }
    return load_recipe(name, {k: {**quiet.get(k, {}), **changes.get(k, {})} for k in {*quiet, *changes}})


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train by a recipe and return where the time of its steps went."""
    clocks = Clocks()
    with clocks.running(), redirect_stderr(StringIO()):
        fit(recipe)
    steps = clocks.seconds(after=WARMUP)
    shares = {
        label: statistics.fmean(step.get(label, 0.0) for step in steps)
        / statistics.fmean(step["period"] for step in steps)
        for label in WORK
    }
    overheads = [1 - sum(step.get(label, 0.0) for label in WORK) / step["period"] for step in steps]
    clipping = [step["clip"] / step["period"] for step in steps]
    return {
        "num_steps": len(steps),
        "step_s": statistics.median(step["period"] for step in steps),
        "shares": shares,
        "overhead": statistics.median(overheads),
        "overhead_mean": 1 - sum(shares.values()),
        "overhead_quartiles": quartiles(overheads),
        "overhead_with_clipping": statistics.median(map(sum, zip(overheads, clipping, strict=True))),
    }


def main() -> None:
    """Train every case."""
    parser = arguments(__doc__)
    parser.add_argument("--cases", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.cases}
    if options.quick:
        cases, options.steps = {"tiny": ("quickstart", TINY)}, WARMUP + 8
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (recipe, changes) in cases.items():
            row = rows[name] = measure(recipe_of(recipe, changes, Path(scratch) / name, steps=options.steps))
            shown = ", ".join(f"{label} {share:.1%}" for label, share in row["shares"].items())
            note(f"{name}: step {1e3 * row['step_s']:.1f} ms; {shown}; overhead {row['overhead']:.2%}")
    bars = [
        bar(f"{name}: trainer overhead, {which}", row[key], most=LIMIT)
        for name, row in rows.items()
        for which, key in (("without clipping", "overhead"), ("with clipping", "overhead_with_clipping"))
    ]
    publish("overhead", {"steps": options.steps, "bars": bars, "cases": rows}, options)


if __name__ == "__main__":
    main()
