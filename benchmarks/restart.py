"""Measure what a restart costs: its share of a cycle of 100 steps, and the memory it needs beside the model.

    python benchmarks/restart.py [--json FILE] [--hidden 256 512 1024 2048] [--rounds 10]

A restart is merge, new factors and optimizer reset, as `ReLoRA.after_step` does it, at r = d/8. It is timed
in turns with a training step of 2048 tokens; steps of a real run have more, and its restarts a smaller share.
The bases in fewer bits have their master in host memory. Memory is the CPU allocator's own count, so that
kernels' scratch is in it, over the largest layer's weight. The exponents say how seconds and bytes grow with
hidden_size: a merge is a product of (d, r) and (r, d).
"""

import statistics
from typing import Any

from common import arguments, bar, exponent, interleaved, note, peak_bytes, publish, quartiles, record
from steps import LAYERS
from training import METHODS, Stepper, llama, restarter, token_batch, wrapped_matrices

DIVISOR = 8
CYCLE = 100
RESTARTED = ("auto", "one-sided", "auto, bf16 base", "one-sided, int8 base")


def measure(hidden: int, method: str, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Time the restarts of one method at one size beside its steps, and count the bytes of one."""
    model = llama(hidden, LAYERS.get(hidden, 2))
    layer_bytes = max(weight.nbytes for weight in wrapped_matrices(model))
    optimizer = METHODS[method].prepare(model, hidden // DIVISOR)
    stepper = Stepper(model, optimizer, token_batch(tokens), precision="fp32")
    restart = restarter(stepper)
    times = interleaved({"step": stepper, "restart": restart}, rounds=rounds)
    step_s, restart_s = (statistics.median(times[name]) for name in ("step", "restart"))
    stepper()
    extra = peak_bytes(restart)
    return {
        "step_s": step_s,
        "restart_s": restart_s,
        "restart_quartiles_s": quartiles(times["restart"]),
        "share_of_cycle": restart_s / (CYCLE * step_s + restart_s),
        "peak_bytes": extra,
        "layer_bytes": layer_bytes,
        "peak_over_layer": extra / layer_bytes,
    }


def growth(rows: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Return the exponents of a restart's seconds, a layer, and bytes over hidden_size."""
    sizes = list(rows)
    seconds = [row["restart_s"] / LAYERS.get(hidden, 2) for hidden, row in rows.items()]
    return {
        "seconds": exponent(sizes, seconds),
        "bytes": exponent(sizes, [row["peak_bytes"] for row in rows.values()]),
    }


def bars(results: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return this project's bars: under 1 % of a cycle, and no more than a layer's memory."""
    found = []
    for name, rows in results.items():
        for hidden, row in rows.items():
            place = f"hidden {hidden}, {name}: restart"
            found.append(bar(f"{place} over a cycle of {CYCLE} steps", row["share_of_cycle"], most=0.01))
            found.append(bar(f"{place}'s peak memory over a layer", row["peak_over_layer"], most=1.0))
    return found


def main() -> None:
    """Measure every method at every size."""
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    tokens = 2048
    if options.quick:
        options.hidden, options.rounds, tokens = [64, 128], 2, 256
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in RESTARTED}
    result: dict[str, Any] = {"divisor": DIVISOR, "cycle": CYCLE, "tokens": tokens, "results": results}
    for hidden in options.hidden:
        for name in RESTARTED:
            row = results[name][hidden] = measure(hidden, name, tokens=tokens, rounds=options.rounds)
            note(
                f"hidden {hidden:5} {name:24}{1e3 * row['restart_s']:9.1f} ms{row['share_of_cycle']:9.3%} "
                f"of a cycle, {row['peak_over_layer']:.2f} layers' bytes"
            )
        result["bars"] = bars(results)
        record("restart", result, options)
    if len(options.hidden) > 1:
        result["exponents"] = {name: growth(rows) for name, rows in results.items()}
    publish("restart", result, options)


if __name__ == "__main__":
    main()
