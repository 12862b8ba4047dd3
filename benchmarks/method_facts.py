"""Print the numbers that docs/method.md quotes: step sizes, Adam's overshoot, what bf16 merges keep.

    python benchmarks/method_facts.py [--json]

Seconds on one core; nothing here is a timing.
"""

import argparse
import json
import warnings

import torch
from torch import nn

from relora import LoRALinear, ReLoRAConfig, inject, merge_and_reinit_


def step_in_weight(config: ReLoRAConfig, *, out_features: int, in_features: int) -> float:
    """Return the RMS change of W by one Adam step on lora_B, over the learning rate."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, bias=False)
    inject(layer, config)
    assert isinstance(layer, LoRALinear)
    lr = 1e-3
    optimizer = torch.optim.Adam([layer.lora_B], lr=lr)
    layer(torch.randn(256, in_features)).square().mean().backward()
    optimizer.step()
    return float(layer.delta().square().mean().sqrt()) / lr


def overshoot(*, beta2: float, reset_step_count: bool, steps: int = 100) -> dict[str, float]:
    """Return Adam's update over its learning rate after moments were zeroed, for a constant gradient."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, beta2), eps=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    state["step"].fill_(0 if reset_step_count else 100_000)
    sizes = []
    for _ in range(steps):
        before = parameter.item()
        optimizer.step()
        sizes.append(before - parameter.item())
    peak = max(sizes)
    return {"first": sizes[0], "peak": peak, "peak_step": sizes.index(peak) + 1, "at_50": sizes[49]}


def merge_loss(*, merge_precision: str, relative_size: float, merges: int) -> float:
    """Return the relative error of the sum of `merges` deltas in a bf16 base of standard deviation 0.02."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.normal_(std=0.02, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inject(layer, ReLoRAConfig(rank=8, merge_precision=merge_precision))
    assert isinstance(layer, LoRALinear)
    everything = slice(None)
    start, wanted = layer.master_rows(everything).double(), torch.zeros(256, 256, dtype=torch.float64)
    for index in range(1, merges + 1):
        with torch.no_grad():
            layer.lora_B.normal_(generator=generator)
            layer.lora_B.mul_(relative_size * start.norm() / layer.delta().norm())
        wanted += layer.delta()
        merge_and_reinit_(layer, seed=0, restart_index=index)
    got = layer.master_rows(everything).double() - start
    return float((got - wanted).norm() / wanted.norm())


def main() -> None:
    """Print every fact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    shape = {"out_features": 512, "in_features": 512}
    recipes = {
        "paper: rank 128, alpha 32, Kaiming": ReLoRAConfig.paper(),
        "alpha = rank, Kaiming": ReLoRAConfig(rank=128, alpha=128, init="kaiming"),
        "orthonormal, scaling 1": ReLoRAConfig(rank=128, alpha=128, init="orthonormal"),
        "matched, factors='B'": ReLoRAConfig(rank=128, factors="B", scaling_rule="matched"),
    }
    grown = {
        f"rank {rank} of {side}": step_in_weight(
            ReLoRAConfig(rank=rank, alpha=32, init="kaiming"), out_features=side, in_features=side
        )
        for rank, side in ((256, 768), (512, 2048))
    }
    matched_kaiming = {
        f"rank {rank} of 768": step_in_weight(
            ReLoRAConfig(rank=rank, scaling_rule="matched", init="kaiming"), out_features=768, in_features=768
        )
        for rank in (48, 192)
    }
    facts = {
        "step_in_weight_over_lr_512x512": {
            name: round(step_in_weight(config, **shape), 3) for name, config in recipes.items()
        },
        "full_rank_step_over_that_of_alpha_32": {name: round(1 / step, 1) for name, step in grown.items()},
        "step_in_weight_over_lr_matched_kaiming": {
            name: round(step, 3) for name, step in matched_kaiming.items()
        },
        "adam_update_after_reset_over_lr": {
            f"beta2 {beta2}, step count {'reset' if reset else 'kept'}": {
                key: round(value, 2) for key, value in overshoot(beta2=beta2, reset_step_count=reset).items()
            }
            for beta2 in (0.999, 0.95)
            for reset in (False, True)
        },
        "relative_error_of_20_merges_into_bf16": {
            f"{precision}, delta {size:g} of W": merge_loss(
                merge_precision=precision, relative_size=size, merges=20
            )
            for size in (1e-3, 1e-2, 1e-1)
            for precision in ("native", "float32")
        },
    }
    if parser.parse_args().json:
        print(json.dumps(facts, indent=2))
        return
    for title, values in facts.items():
        print(title.replace("_", " "))
        for name, value in values.items():
            print(f"  {name}: {value if isinstance(value, dict) else format(value, '.4g')}")


if __name__ == "__main__":
    main()
