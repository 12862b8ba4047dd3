"""Measure what a restart costs: its share of a cycle of 100 steps, and the memory it needs beside the model.

    python benchmarks/restart.py [--json FILE] [--hidden 256 512 1024 2048] [--rounds 10]

A restart is merge, new factors and optimizer reset, as `ReLoRA.after_step` does it, at r = d/8. It is timed
in turns with a training step of 2048 tokens; steps of a real run have more, and its restarts a smaller share.
Memory is the CPU allocator's own count, so that kernels' scratch is in it, over the largest layer's weight.
The exponents say how seconds and bytes grow with hidden_size: a merge is a product of (d, r) and (r, d).
"""

import statistics
from typing import Any

from common import arguments, bar, exponent, interleaved, note, peak_bytes, publish, record
from steps import LAYERS
from training import Stepper, adamw, llama, token_batch, wrapped_matrices

from relora import ReLoRA, ReLoRAConfig, inject

DIVISOR = 8
CYCLE = 100
VARIANTS: dict[str, dict[str, Any]] = {
    "both factors": {},
    "one-sided": {"factors": "B", "reset": "none"},
    "both factors, bf16 base, host master": {"base_dtype": "bf16", "master": "host"},
    "one-sided, int8 base, host master": {"factors": "B", "base_dtype": "int8", "master": "host"},
}


class Cycle:
    """A model in training that can be restarted after any step."""

    def __init__(self, hidden: int, settings: dict[str, Any], *, tokens: int) -> None:
        model = llama(hidden, LAYERS.get(hidden, 2))
        self.layer_bytes = max(weight.nbytes for weight in wrapped_matrices(model))
        config = ReLoRAConfig(rank=hidden // DIVISOR, restart_every=1, **settings)
        inject(model, config)
        optimizer = adamw(model)
        self.train = Stepper(model, optimizer, token_batch(tokens), precision="fp32")
        self._relora = ReLoRA(model, optimizer, config)

    def restart(self) -> None:
        """Restart after the step just taken."""
        report = self._relora.after_step(self.train.step)
        assert report is not None and not report.merge.unmoved_layers


def measure(hidden: int, settings: dict[str, Any], *, tokens: int, rounds: int) -> dict[str, Any]:
    """Time the restarts of one variant at one size beside its steps, and count the bytes of one."""
    cycle = Cycle(hidden, settings, tokens=tokens)
    times = interleaved({"step": cycle.train, "restart": cycle.restart}, rounds=rounds)
    step_s, restart_s = (statistics.median(times[name]) for name in ("step", "restart"))
    cycle.train()
    extra = peak_bytes(cycle.restart)
    return {
        "step_s": step_s,
        "restart_s": restart_s,
        "restart_quartiles_s": statistics.quantiles(times["restart"], n=4, method="inclusive"),
        "share_of_cycle": restart_s / (CYCLE * step_s + restart_s),
        "peak_bytes": extra,
        "layer_bytes": cycle.layer_bytes,
        "peak_over_layer": extra / cycle.layer_bytes,
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
    """Measure every variant at every size."""
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    tokens = 2048
    if options.quick:
        options.hidden, options.rounds, tokens = [64, 128], 2, 256
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in VARIANTS}
    result: dict[str, Any] = {"divisor": DIVISOR, "cycle": CYCLE, "tokens": tokens, "results": results}
    for hidden in options.hidden:
        for name, settings in VARIANTS.items():
            row = results[name][hidden] = measure(hidden, settings, tokens=tokens, rounds=options.rounds)
            note(
                f"hidden {hidden:5} {name:38}{1e3 * row['restart_s']:9.1f} ms{row['share_of_cycle']:9.3%} "
                f"of a cycle, {row['peak_over_layer']:.2f} layers' bytes"
            )
        result["bars"] = bars(results)
        record("restart", result, options)
    if len(options.hidden) > 1:
        result["exponents"] = {name: growth(rows) for name, rows in results.items()}
    publish("restart", result, options)


if __name__ == "__main__":
    main()
