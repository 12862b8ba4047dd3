"""Time whole training steps of full rank, PEFT LoRA, ReLoRA and GaLore beside their FLOP limits.

    python benchmarks/steps.py [--json FILE] [--hidden 1024 512 256 2048] [--ratios 16 4 8 32] [--rounds 10]

A step is forward, backward, clipping and update, the trainer's own, of one micro batch of 2048 tokens on a
stack of LLaMA decoder layers. Methods take turns within a round; a speed is the median over rounds of the
ratio within a round. Its limit is the ratio of the FLOPs counted in the steps themselves: the matrix products
of layers, attention, head and optimizer. PEFT LoRA trains its factors alone, so it is compared with ReLoRA
training the same ("factors only"). GaLore's projectors are made in a first step, which is given apart: the
timed steps have no refresh. The exponents say how a layer's seconds grow with hidden_size. The cells of the
bars come first, and the file is written after each cell.
"""

import argparse
from collections import defaultdict
from typing import Any, cast

from common import arguments, bar, chosen_precisions, exponent, interleaved, note, publish, ratios, record
from training import METHODS, llama, steppers, token_batch, wrapped_matrices

from relora.train.precision import Resolved

LAYERS = {256: 8, 512: 4, 1024: 2, 2048: 1}
"""Decoder layers by hidden_size."""
TIMED = tuple(name for name in METHODS if "base" not in name)
BARS = (
    (1024, 16, "effective", "full", {"fp32": 1.20, "bf16": 1.15}),
    (1024, 16, "one-sided", "full", {"fp32": 1.27, "bf16": 1.20}),
    (1024, 16, "effective, factors only", "PEFT LoRA", {"fp32": 1.05, "bf16": 1.05}),
    (1024, 16, "one-sided, factors only", "PEFT LoRA", {"fp32": 1.05, "bf16": 1.05}),
    (1024, 4, "one-sided", "full", {"fp32": 1.08, "bf16": 1.08}),
)
"""hidden_size, hidden_size / rank, method, what it is compared with, and the least speed by precision."""
NEVER_SLOWER = ("auto", "one-sided")


def measure(
    hidden: int, divisor: int, precision: Resolved, *, methods: list[str], tokens: int, rounds: int
) -> dict[str, Any]:
    """Compare methods at one size, rank and precision."""
    rank, num_layers = hidden // divisor, LAYERS.get(hidden, 2)
    plain, batch = llama(hidden, num_layers), token_batch(tokens)
    wrapped = sum(weight.numel() for weight in wrapped_matrices(plain))
    each = steppers(plain, methods, rank=rank, tokens=batch, precision=precision)
    first = interleaved(each, rounds=1, warmup=0)
    flops = {name: stepper.flops() for name, stepper in each.items()}
    times = interleaved(each, rounds=rounds)
    full_flops = flops["full"]
    rows: dict[str, Any] = {name: {"first_step_s": first[name][0], "flops": flops[name]} for name in methods}
    for base in {"full", "PEFT LoRA"} & set(methods):
        for name, found in ratios(times, base=base).items():
            limit = flops[base] / flops[name]
            against = {key: value for key, value in found.items() if key != "median_s"}
            rows[name]["median_s"] = found["median_s"]
            rows[name][f"over {base}"] = against | {
                "flop_limit": limit,
                "share_of_limit": found["speed"] / limit,
            }
    return {
        "hidden_size": hidden,
        "rank": rank,
        "divisor": divisor,
        "num_layers": num_layers,
        "tokens": batch.numel(),
        "precision": precision,
        "rounds": rounds,
        "wrapped_share_of_flops": 6 * batch.numel() * wrapped / full_flops,
        "methods": rows,
    }


def bars(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return this project's bars for which there is a measurement."""
    found = []
    for cell in cells:
        place = f"hidden {cell['hidden_size']}, r/d 1/{cell['divisor']}, {cell['precision']}"
        for hidden, divisor, method, base, least in BARS:
            if (cell["hidden_size"], cell["divisor"]) == (hidden, divisor) and cell["tokens"] == 2048:
                found += _bar(cell, f"{place}: {method} over {base}", method, base, least[cell["precision"]])
        if cell["divisor"] >= 8 and cell["tokens"] >= 8 * cell["rank"]:
            for method in NEVER_SLOWER:
                found += _bar(cell, f"{place}: {method} not slower than full", method, "full", 1.0)
    return found


def growth(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponents over hidden_size of a layer's seconds, by method, ratio and precision."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for cell in cells:
        for name, row in cell["methods"].items():
            what = f"{name}, r/d 1/{cell['divisor']}, {cell['precision']}"
            points[what].append((cell["hidden_size"], row["median_s"] / cell["num_layers"]))
    return {
        what: exponent(*zip(*found, strict=True))
        for what, found in points.items()
        if len({hidden for hidden, _ in found}) > 1
    }


def _bar(cell: dict[str, Any], what: str, method: str, base: str, least: float) -> list[dict[str, Any]]:
    against = cell["methods"].get(method, {}).get(f"over {base}")
    if against is None:
        return []
    beside = {key: value for key, value in against.items() if key != "speed"}
    return [bar(what, against["speed"], least=least, **beside)]


def show(cell: dict[str, Any]) -> None:
    """Print one cell as a table."""
    note(
        f"\nhidden {cell['hidden_size']}, rank {cell['rank']}, {cell['num_layers']} layers, "
        f"{cell['precision']}; wrapped matrices have {cell['wrapped_share_of_flops']:.1%} of the FLOPs"
    )
    limits = f"{'limit':>8}{'of it':>7}"
    note(f"  {'':26}{'ms':>9}{'over full':>11}{limits}{'over PEFT':>11}{limits}")
    for name, row in cell["methods"].items():
        columns = [f"  {name:26}{1e3 * row['median_s']:9.1f}"]
        for base in ("full", "PEFT LoRA"):
            against = row.get(f"over {base}")
            if against is not None:
                columns.append(
                    f"{against['speed']:11.3f}{against['flop_limit']:8.3f}{against['share_of_limit']:7.2f}"
                )
        note("".join(columns))


def parse() -> argparse.Namespace:
    """Return the command line's settings; --quick is one small cell in two rounds."""
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 512, 256, 2048])
    parser.add_argument("--ratios", type=int, nargs="+", default=[16, 4, 8, 32], help="hidden / rank")
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", help="default: what is fast here")
    parser.add_argument("--methods", choices=TIMED, nargs="+", default=list(TIMED))
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro batch")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.ratios, options.tokens, options.rounds = [64], [8], 512, 2
        options.precision = ["fp32"]
    return options


def main() -> None:
    """Measure every cell asked for."""
    options = parse()
    precisions, left_out = chosen_precisions(options.precision)
    wanted = list(dict.fromkeys(["full", *options.methods]))  # every limit is one over full rank
    obstacles = {name: METHODS[name].obstacle for name in wanted}
    methods = [name for name in wanted if obstacles[name] is None]
    result: dict[str, Any] = {
        "absent": {name: why for name, why in obstacles.items() if why is not None} | left_out,
        "bars": [],
        "exponents": {},
        "cells": [],
    }
    for hidden in options.hidden:
        for divisor in options.ratios:
            for precision in precisions:
                cell = measure(
                    hidden,
                    divisor,
                    cast(Resolved, precision),
                    methods=methods,
                    tokens=options.tokens,
                    rounds=options.rounds,
                )
                show(cell)
                result["cells"].append(cell)
                result["bars"] = bars(result["cells"])
                result["exponents"] = growth(result["cells"])
                record("steps", result, options)
    publish("steps", result, options)


if __name__ == "__main__":
    main()
