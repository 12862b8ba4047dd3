"""Print the numbers that docs/beyond.md quotes: what a sketch captures, how often votes tie, what
lora_B carries of a coded base's error, and the bytes that a step leaves.

    python benchmarks/beyond_facts.py [--json]

About a minute on one core; nothing here is a timing.
"""

import argparse
import importlib.util
import json
import math

import torch
from torch import Tensor, nn

from relora import LoRALinear, ReLoRA, ReLoRAConfig, inject
from relora.method.base_error import carry_base_error_
from relora.method.gradient_init import Sketch
from relora.method.linear import lora_layers
from relora.method.residuals import RESIDUALS, Pass
from relora.train.in_place_optimizer import InPlaceOptimizer
from relora.train.phase import momenta, state_bytes

# A LLaMA layer's matrices at hidden 128.
SHAPES = [(128, 128)] * 4 + [(128, 352)] * 2 + [(352, 128)]
NUM_WEIGHTS = sum(math.prod(shape) for shape in SHAPES)


def with_spectrum(side: int, *, decay: float, seed: int) -> Tensor:
    """Return a random (side, side) matrix whose i-th singular value is i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(side, side, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(side, side, generator=generator))
    return (left * torch.arange(1, side + 1) ** -decay) @ right.T


def captured(side: int, rank: int, *, decay: float, trials: int = 5) -> dict[str, float]:
    """Return the energy of a gradient in lora_A's rows over that in the best rows, by ways to choose them."""
    totals = {"sketch": 0.0, "random": 0.0, "rank + 8, one power iteration": 0.0}
    for seed in range(trials):
        gradient = with_spectrum(side, decay=decay, seed=seed)
        best = float(torch.linalg.svdvals(gradient)[:rank].square().sum())
        layer = nn.Linear(side, side, bias=False)
        inject(layer, ReLoRAConfig(rank=rank, factors="B", init="gradient"), seed=seed)
        assert isinstance(layer, LoRALinear)
        sketch = Sketch(layer, seed=seed, restart_index=1)
        sketch.observe(torch.eye(side), gradient.T)
        drawn = sketch.rows()
        assert drawn is not None
        rows = {
            "sketch": drawn[0].float(),
            "random": layer.lora_A.detach(),
            "rank + 8, one power iteration": iterated(gradient, rank, seed),
        }
        for way, chosen in rows.items():
            totals[way] += float((gradient @ chosen.T).square().sum()) / best / trials
    return totals


def iterated(gradient: Tensor, rank: int, seed: int) -> Tensor:
    """Return what a sketch of rank + 8 rows and one power iteration, which needs G twice more, would give."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(len(gradient), rank + 8, generator=generator)
    right, _ = torch.linalg.qr(gradient.T @ omega)
    left, _ = torch.linalg.qr(gradient @ right)
    rows: Tensor = torch.linalg.svd(left.T @ gradient, full_matrices=False).Vh[:rank]
    return rows


def carried(size: int, rank: int, *, dtype: str = "int8", rounds: int = 3) -> float:
    """Return the share of the error of a base of codes that lora_B can carry."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    inject(model, ReLoRAConfig(rank=rank, factors="B", base_dtype=dtype, master="host", init="orthonormal"))
    return carry_base_error_(lora_layers(model), rounds=rounds).cancelled_fraction


def _nf4_ranks() -> tuple[int, ...]:
    return (128, 64) if importlib.util.find_spec("bitsandbytes") else ()


def moved_by_noise(num_micro_batches: int) -> float:
    """Return the fraction of entries that a vote moves if every micro batch's gradient is pure noise."""
    generator = torch.Generator().manual_seed(0)
    votes = RESIDUALS["sign"]
    held = torch.zeros(1000, 1000, dtype=torch.int8)
    for before in range(num_micro_batches):
        votes.add_(
            held,
            torch.randn(held.shape, generator=generator),
            Pass(num_before=before, world_size=1, generator=generator),
        )
    return float(votes.directions(held)(slice(None)).abs().mean())


def held_a_weight(
    config: ReLoRAConfig | None,
    optimizer_type: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> float:
    """Return the bytes of gradients, states and votes of a step, for each weight of a LLaMA layer's matrices.

    Args:
        config: Of low-rank layers; None trains the matrices themselves.
        optimizer_type: Of what trains.
    """
    layers = matrices()
    if config is not None:
        inject(layers, config)
    trained = [p for p in layers.parameters() if p.requires_grad]
    optimizer = optimizer_type(trained)  # type: ignore[call-arg]
    restarts = None if config is None else ReLoRA(layers, optimizer, config)
    backward_through(layers)
    optimizer.step()
    if restarts is not None:
        restarts.after_step(1)
    held = state_bytes(optimizer, layers) + sum(p.grad.nbytes for p in trained if p.grad is not None)
    report = None if restarts is None else restarts.complement_report
    if report is not None and not momenta(layers):
        held += report.held_bytes
    return held / NUM_WEIGHTS


def held_in_place() -> float:
    """Return the same of full rank by Muon in place."""
    layers = matrices()
    weights = [layer.weight for layer in layers]
    by_name = {f"{index}": layer for index, layer in enumerate(layers)}
    groups = [{"params": weights, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = InPlaceOptimizer(groups, layers, by_name, kind="muon", seed=0)
    backward_through(layers)
    optimizer.step()
    assert optimizer.report is not None and optimizer.report.moved_fraction > 0
    gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    return (state_bytes(optimizer, layers) + gradients) / NUM_WEIGHTS


def matrices() -> nn.ModuleList:
    """Return linear layers of the shapes."""
    return nn.ModuleList(nn.Linear(*shape, bias=False) for shape in SHAPES)


def backward_through(layers: nn.ModuleList) -> None:
    """Take a backward pass through each of them, from inputs that something before them made."""
    inputs = [torch.randn(8, layer.in_features, requires_grad=True) for layer in layers]
    torch.stack([layer(x).sum() for layer, x in zip(layers, inputs, strict=True)]).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    facts = {
        "captured energy, 512 x 512": {
            f"rank {rank}, singular values i^-{decay:g}": captured(512, rank, decay=decay)
            for rank in (32, 128)
            for decay in (0.25, 0.5, 1.0, 2.0)
        },
        "share of a coded base's error that lora_B carries, 512 x 512": {
            f"int8, rank {rank}, {rounds} rounds": carried(512, rank, rounds=rounds)
            for rank in (128, 64)
            for rounds in (1, 3)
        }
        | {f"nf4, rank {rank}, 3 rounds": carried(512, rank, dtype="nf4") for rank in _nf4_ranks()},
        "bytes of gradients and states a weight, LLaMA layer of hidden 128": {
            "full rank, AdamW": held_a_weight(None),
            "full rank, Muon": held_a_weight(None, torch.optim.Muon),
            "full rank, Muon in place, and a warm start by it": held_in_place(),
            "LoRA or ReLoRA, both factors, rank 32": held_a_weight(ReLoRAConfig(rank=32)),
            **{
                f"one-sided, residual {residual}, rank {rank}": held_a_weight(
                    ReLoRAConfig.beyond(rank=rank, residual=residual, residual_scale=1.0)
                )
                for residual in ("none", "sign", "muon")
                for rank in (16, 32)
            },
        },
        "entries moved by noise, by micro batches": {k: moved_by_noise(k) for k in (1, 2, 3, 4, 8, 16)},
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for title, rows in facts.items():
        print(title)
        for name, value in rows.items():
            shown = value if isinstance(value, float) else {k: round(v, 3) for k, v in value.items()}
            print(f"  {name}: {shown}")


if __name__ == "__main__":
    main()
