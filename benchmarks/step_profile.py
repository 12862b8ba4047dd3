"""Where the time of a training step goes, and what that leaves for a faster linear layer to win.

    python benchmarks/step_profile.py [--json FILE] [--hidden 1024] [--ratios 16 4] [--rounds 10]

The steps are those of steps.py, under torch's profiler, methods in turn. An operation's own time is put to
one of these: products of the wrapped layers as wide as the layer, their narrow products (rank wide; forming
the weight is one), other products (head, loss), attention, update (clipping and optimizer), and the rest,
mostly the memory traffic of elementwise operations. The FLOP limit of steps.py takes every FLOP for equally
fast, and what has none for free. The bound here does not: it leaves full rank's time outside the wrapped
layers as measured, and lets their products alone shrink to the method's FLOPs, at full rank's FLOPs a second.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from common import arguments, note, publish
from steps import LAYERS
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from training import Stepper, llama, steppers, token_batch

TOKENS = 2048
PROFILED = ("full", "effective", "one-sided")
KINDS = ("wide products", "narrow products", "other products", "attention", "update", "rest")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_")
_UPDATE = ("aten::_fused_adamw_", "aten::_foreach", "aten::linalg_vector_norm", "aten::stack")


def kind_of(event: FunctionEvent, *, sides: set[int], rank: int) -> str:
    """Return what an operation counts as.

    Args:
        event: Recorded with its shapes.
        sides: Tokens, and the widths of the wrapped layers.
        rank: Of the factors.
    """
    if event.name in _PRODUCTS:
        shapes: Sequence[Sequence[int]] = [shape for shape in event.input_shapes if len(shape) == 2]
        lengths = {length for shape in shapes for length in shape}
        if lengths <= sides:
            return "wide products"
        return "narrow products" if lengths <= {*sides, rank} else "other products"
    if "scaled_dot_product" in event.name:
        return "attention"
    return "update" if event.name.startswith(_UPDATE) else "rest"


def profiled(stepper: Stepper, *, sides: set[int], rank: int) -> tuple[Counter[str], Counter[str]]:
    """Take a step; return its milliseconds and its GFLOPs by kind."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        stepper()
    times: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for event in profiler.events() or ():
        kind = kind_of(event, sides=sides, rank=rank)
        times[kind] += event.self_cpu_time_total / 1e3
        flops[kind] += (event.flops or 0) / 1e9
    return times, flops


def measure(hidden: int, divisor: int, *, rounds: int) -> dict[str, Any]:
    """Profile every method at one size and rank."""
    rank, plain, batch = hidden // divisor, llama(hidden, LAYERS.get(hidden, 2)), token_batch(TOKENS)
    sides = {TOKENS, hidden, plain.config.intermediate_size}
    each = steppers(plain, PROFILED, rank=rank, tokens=batch, precision="fp32")
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in PROFILED}
    flops: dict[str, Counter[str]] = {}
    for index in range(rounds + 2):
        for name, stepper in each.items():
            spent, flops[name] = profiled(stepper, sides=sides, rank=rank)
            for kind in KINDS if index >= 2 else ():
                times[name][kind].append(spent[kind])
    methods = {name: _row(times[name], flops[name]) for name in PROFILED}
    full = methods["full"]
    wrapped, whole = full["ms"]["wide products"], sum(full["ms"].values())
    for row in methods.values():
        gflops = row["gflops"]["wide products"] + row["gflops"]["narrow products"]
        left = gflops / full["gflops"]["wide products"]
        row["wrapped_flop_limit"] = 1 / left
        row["bound"] = whole / (whole - wrapped * (1 - left))
    return {
        "hidden_size": hidden,
        "rank": rank,
        "divisor": divisor,
        "tokens": TOKENS,
        "wrapped_share_of_full_time": wrapped / whole,
        "methods": methods,
    }


def _row(times: dict[str, list[float]], flops: Counter[str]) -> dict[str, Any]:
    ms = {kind: statistics.median(times[kind]) for kind in KINDS}
    gflops = {kind: flops[kind] for kind in KINDS if "products" in kind}
    rates = {kind: 1e3 * gflops[kind] / ms[kind] for kind in gflops if ms[kind] > 0}
    return {"ms": ms, "gflops": gflops, "gflops_per_s": rates}


def show(cell: dict[str, Any]) -> None:
    """Print one cell as a table."""
    note(
        f"\nhidden {cell['hidden_size']}, rank {cell['rank']}: wrapped layers take "
        f"{cell['wrapped_share_of_full_time']:.0%} of full rank's time"
    )
    note(f"  {'ms':12}" + "".join(f"{kind:>17}" for kind in KINDS) + f"{'bound':>8}")
    for name, row in cell["methods"].items():
        columns = []
        for kind in KINDS:
            rate = row["gflops_per_s"].get(kind)
            columns.append(f"{row['ms'][kind]:.0f}" + (f" ({rate:.0f} GF/s)" if rate else ""))
        note(f"  {name:12}" + "".join(f"{column:>17}" for column in columns) + f"{row['bound']:8.3f}")


def parse() -> argparse.Namespace:
    """Return the command line's settings; --quick is one small cell in two rounds."""
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024])
    parser.add_argument("--ratios", type=int, nargs="+", default=[16, 4], help="hidden / rank")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.ratios, options.rounds = [64], [8], 2
    return options


def main() -> None:
    """Profile every cell asked for."""
    options = parse()
    cells = []
    for hidden in options.hidden:
        for divisor in options.ratios:
            cells.append(measure(hidden, divisor, rounds=options.rounds))
            show(cells[-1])
    headline = {
        f"hidden {cell['hidden_size']}, r/d 1/{cell['divisor']}: bound of {name}": row["bound"]
        for cell in cells
        for name, row in cell["methods"].items()
        if name != "full"
    }
    publish("step_profile", {"headline": headline, "cells": cells}, options)


if __name__ == "__main__":
    main()
