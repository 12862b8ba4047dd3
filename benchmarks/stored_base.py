"""Print what a base in fewer bits costs and keeps: bytes, merges, restarts, and how small a delta shows.

    python benchmarks/stored_base.py [--json FILE]

About a minute on one core. Rows with nf4 need the bitsandbytes extra. Only the restart's cost is a timing,
taken as a ratio to a step measured beside it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora import LoRALinear, ReLoRA, ReLoRAConfig, inject, merge_and_reinit_
from relora.errors import ConfigError
from relora.method.codecs import base_codec

STORES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"base_dtype": "bf16"},
    "bf16, host master": {"base_dtype": "bf16", "master": "host"},
    "int8, host master": {"base_dtype": "int8", "master": "host"},
    "nf4, host master": {"base_dtype": "nf4", "master": "host"},
}
EVERYTHING = slice(None)


def build(store: dict[str, Any], *, hidden: int, rank: int, **settings: Any) -> LoRALinear:
    """Return a square layer with weights of standard deviation 0.02."""
    torch.manual_seed(0)
    layer = nn.Linear(hidden, hidden, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    inject(layer, ReLoRAConfig(rank=rank, **store, **settings))
    assert isinstance(layer, LoRALinear)
    return layer


@torch.no_grad()
def scale_delta_(layer: LoRALinear, size: float, seed: int) -> Tensor:
    """Give lora_B values that make the delta `size` times the base; return the delta."""
    layer.lora_B.normal_(generator=torch.Generator().manual_seed(seed))
    layer.lora_B.mul_(size * layer.master_rows(EVERYTHING).double().norm() / layer.delta().norm())
    return layer.delta()


def device_bytes(store: dict[str, Any]) -> float:
    """Return the bytes a frozen weight takes on the device."""
    layer = build(store, hidden=256, rank=8)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    held = sum(t.nbytes for name, t in tensors.items() if name.startswith("weight"))
    return held / 256**2


def rounding(store: dict[str, Any]) -> float:
    """Return the relative error of a Gaussian base as stored."""
    layer = build(store, hidden=256, rank=8)
    exact = layer.master_rows(EVERYTHING)
    return float((layer.weight_rows(EVERYTHING) - exact).norm() / exact.norm())


def survival(store: dict[str, Any], *, size: float, merges: int = 20) -> dict[str, float]:
    """Return which share of `merges` deltas the exact base has, and one coded from its codes would have."""
    layer = build(store, hidden=256, rank=8)
    codec = base_codec(store["base_dtype"])

    def stored(values: Tensor) -> Tensor:
        if codec is None:
            return values.bfloat16().float()
        return codec.decode(*codec.encode(values), columns=256, dtype=torch.float32)

    start = layer.master_rows(EVERYTHING).clone()
    naive = naive_start = stored(start)
    wanted = torch.zeros_like(start)
    for index in range(1, merges + 1):
        delta = scale_delta_(layer, size, index).float()
        wanted += delta
        naive = stored(naive + delta)
        merge_and_reinit_(layer, seed=0, restart_index=index)
    change = {"here": layer.master_rows(EVERYTHING) - start, "naive": naive - naive_start}
    return {k: float((v * wanted).sum() / wanted.square().sum()) for k, v in change.items()}


@torch.no_grad()
def shown(store: dict[str, Any], *, size: float) -> float:
    """Return which share of a delta's output the effective weight gives in bfloat16, on random inputs."""
    layer = build(store, hidden=1024, rank=64, forward="effective")
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x).float()
        delta = scale_delta_(layer, size, 2).float()
        change = layer(x).float() - before
    wanted = x @ delta.T
    return float((change * wanted).sum() / wanted.square().sum())


def restart_cost(store: dict[str, Any], *, rank: int) -> float:
    """Return a restart's time over a micro step's of 2048 tokens: one layer, bfloat16 autocast, AdamW."""
    layer = build(store, hidden=1024, rank=rank, restart_every=2)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3, fused=True)
    relora = ReLoRA(layer, optimizer, layer.config)
    x = torch.randn(2048, 1024, requires_grad=True)
    steps, restarts = [], []
    for step in range(1, 14):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = time.perf_counter()
        if relora.after_step(step) is not None:
            restarts.append(time.perf_counter() - middle)
        steps.append(middle - begun)
    return statistics.median(restarts) / statistics.median(steps)


def main() -> None:
    """Print every fact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stores = dict(STORES)
    try:
        base_codec("nf4")
    except ConfigError as error:
        print(f"without nf4: {error}")
        del stores["nf4, host master"]
    sizes = (1e-3, 1e-2, 1e-1)
    reduced = {name: store for name, store in stores.items() if store}
    facts = {
        "bytes a frozen weight on the device": {n: round(device_bytes(s), 4) for n, s in stores.items()},
        "relative error of the base as stored": {n: round(rounding(s), 5) for n, s in reduced.items()},
        "share of 20 merged deltas that the exact base has (here), or its own codes would (naive)": {
            f"{name}, delta {size:g} of W": survival(store, size=size)
            for name, store in reduced.items()
            for size in sizes
        },
        "share of a delta's output that shows in bf16 autocast": {
            f"{name}, delta {size:g} of W": shown(store, size=size)
            for name, store in list(stores.items())[:2]
            for size in (1e-4, *sizes)
        },
        "a restart over one micro step of 2048 tokens, hidden 1024": {
            f"{name}, rank {rank}": round(restart_cost(store, rank=rank), 2)
            for name, store in stores.items()
            for rank in (64, 256)
        },
    }
    for title, values in facts.items():
        print(title)
        for name, value in values.items():
            print(f"  {name}: {value if isinstance(value, dict) else format(value, '.3g')}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
