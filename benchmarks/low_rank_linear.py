"""Time forward and backward of one linear layer at full rank and with factors, and count what each keeps.

    python benchmarks/low_rank_linear.py [--json FILE] [--hidden 256 512 1024 2048] [--rounds 12]

One thread, and its CPU seconds, so that time in which other programs have the core does not count (on an
idle machine they are the wall clock's). The variants take turns within a round; ratios are of medians, and
of minima, which a shared cache disturbs less. Beside each ratio stands its limit, the ratio of FLOPs.

Bytes kept for the backward, a token, are counted on the layer alone, its parameters left out; at full rank
and on the factored path under autocast they include a bfloat16 copy of weight and factors.
"""

import statistics
import time
from itertools import product
from typing import Any

import torch
from common import arguments, bar, chosen_precisions, interleaved, note, publish, record
from torch import Tensor, nn

from relora import ReLoRAConfig, inject
from relora.method.flops import layer_flops

DIVISORS = (16, 4, 8, 32)
SHARE_OF_LIMIT = 0.85
VARIANTS = {
    "full": None,
    "factored": {"forward": "factored"},
    "effective": {"forward": "effective"},
    "factored, one-sided": {"forward": "factored", "factors": "B"},
    "effective, one-sided": {"forward": "effective", "factors": "B"},
    "effective, columns": {"forward": "effective", "factors": "B", "init": "columns"},
    "effective, one-sided, bf16 base": {"forward": "effective", "factors": "B", "base_dtype": "bf16"},
}


def build(hidden: int, rank: int, settings: dict[str, Any] | None) -> nn.Module:
    """Return a square layer, at full rank or in mid-cycle."""
    torch.manual_seed(0)
    layer = nn.Linear(hidden, hidden, bias=False)
    if settings is not None:
        inject(layer, ReLoRAConfig(rank=rank, **settings))
        nn.init.normal_(layer.lora_B, std=0.01)
    return layer


def flops(hidden: int, rank: int, tokens: int, settings: dict[str, Any] | None) -> int:
    """Return the FLOPs of forward and backward."""
    if settings is None:
        return 6 * tokens * hidden**2
    kind = {"one_sided": settings.get("factors") == "B", "selects": settings.get("init") == "columns"}
    return layer_flops(
        settings["forward"], tokens, out_features=hidden, in_features=hidden, rank=rank, **kind
    )


def one_step(layer: nn.Module, x: Tensor, grad: Tensor, *, autocast: bool) -> None:
    """Run forward and backward, and drop the gradients."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.backward(grad)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def kept_bytes(layer: nn.Module, x: Tensor, *, autocast: bool) -> int:
    """Count the bytes that the forward keeps for the backward, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.sum().backward()
    return sum(kept.values())


def measure(hidden: int, divisor: int, tokens: int, *, autocast: bool, rounds: int) -> dict[str, Any]:
    """Compare the variants at one size."""
    rank = hidden // divisor
    layers = {name: build(hidden, rank, settings) for name, settings in VARIANTS.items()}
    x = torch.randn(tokens, hidden, requires_grad=True)
    grad = torch.randn(tokens, hidden, dtype=torch.bfloat16 if autocast else torch.float32)
    steps = {
        name: lambda layer=layer: one_step(layer, x, grad, autocast=autocast)
        for name, layer in layers.items()
    }
    times = interleaved(steps, rounds=rounds, warmup=2, clock=time.process_time)
    medians = {name: statistics.median(values) for name, values in times.items()}
    full_flops = flops(hidden, rank, tokens, None)
    rows = {}
    for name, settings in VARIANTS.items():
        limit = full_flops / flops(hidden, rank, tokens, settings)
        speedup = medians["full"] / medians[name]
        rows[name] = {
            "median_s": medians[name],
            "min_s": min(times[name]),
            "speedup": round(speedup, 3),
            "speedup_of_minima": round(min(times["full"]) / min(times[name]), 3),
            "flop_limit": round(limit, 3),
            "share_of_limit": round(speedup / limit, 3),
            "kept_bytes_a_token": round(kept_bytes(layers[name], x * 1.0, autocast=autocast) / tokens, 1),
        }
    precision = "bf16" if autocast else "fp32"
    return {"hidden": hidden, "rank": rank, "tokens": tokens, "precision": precision, "variants": rows}


def bars(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return this project's bar where it is set: at hidden_size 1024 and 2048 tokens."""
    return [
        bar(
            f"hidden 1024, rank {result['rank']}, {result['precision']}: {name}, share of the FLOP limit",
            result["variants"][name]["share_of_limit"],
            least=SHARE_OF_LIMIT,
        )
        for result in results
        if (result["hidden"], result["tokens"]) == (1024, 2048)
        for name in ("effective", "effective, one-sided", "effective, columns")
    ]


def show(result: dict[str, Any]) -> None:
    """Print one size as a table."""
    note(f"\nhidden {result['hidden']}, rank {result['rank']}, {result['precision']}")
    note(f"  {'':32}{'ms':>9}{'speed-up':>10}{'limit':>8}{'of it':>7}{'kept bytes a token':>20}")
    for name, row in result["variants"].items():
        note(
            f"  {name:32}{1e3 * row['median_s']:9.2f}{row['speedup']:10.3f}{row['flop_limit']:8.3f}"
            f"{row['share_of_limit']:7.2f}{row['kept_bytes_a_token']:20.1f}"
        )


def main() -> None:
    """Measure every size asked for."""
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 512, 256, 2048])
    parser.add_argument("--divisors", type=int, nargs="+", default=list(DIVISORS), help="hidden / rank")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", help="default: what is fast here")
    parser.add_argument("--rounds", type=int, default=12, help="at least 10 for a median worth its name")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.divisors, options.tokens, options.rounds = [32], [8], 64, 2
    torch.set_num_threads(1)
    precisions, left_out = chosen_precisions(options.precision)
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "absent": left_out,
        "rounds": options.rounds,
        "results": results,
    }
    for hidden, divisor, precision in product(options.hidden, options.divisors, precisions):
        autocast = precision == "bf16"
        results.append(measure(hidden, divisor, options.tokens, autocast=autocast, rounds=options.rounds))
        show(results[-1])
        report["bars"] = bars(results)
        record("low_rank_linear", report, options)
    publish("low_rank_linear", report, options)


if __name__ == "__main__":
    main()
