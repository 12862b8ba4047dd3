"""Small models and helpers that the tests of `relora.method` share."""

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from reference.low_rank import Array
from relora import LoRALinear, lora_parameters


class Conv1D(nn.Module):
    """GPT-2's linear layer as `transformers` defines it: weight (in, out), bias always."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


def linear(in_features: int, out_features: int, *, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def conv1d(in_features: int, out_features: int, *, seed: int = 0) -> Conv1D:
    torch.manual_seed(seed)
    return Conv1D(out_features, in_features)


LAYER_KINDS: dict[str, Callable[[int, int], nn.Module]] = {"linear": linear, "conv1d": conv1d}


def mlp(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 7))


@torch.no_grad()
def train_factors_(model: nn.Module, *, std: float = 0.1, seed: int = 1) -> None:
    """Stand in for training: give every lora_B values that do not vanish."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model):
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def layers_of(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def as_rows(layer: nn.Module) -> Array:
    """Return a layer's stored weight as (out, in) float64, whichever way it is stored."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    values = numpy64(weight)
    is_transposed = isinstance(layer, Conv1D) or getattr(layer, "is_transposed", False)
    return values.T if is_transposed else values


def numpy64(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def max_difference(left: Tensor, right: Tensor) -> float:
    return float((left.detach().double() - right.detach().double()).abs().max())


def structure(model: nn.Module) -> list[tuple[str, type, list[tuple[str, tuple[int, ...], bool]]]]:
    """Return every module's name, type and own parameters: what inject changes and must not half change."""
    return [
        (name, type(m), [(k, tuple(p.shape), p.requires_grad) for k, p in m.named_parameters(recurse=False)])
        for name, m in model.named_modules()
    ]


class Tower(nn.Module):
    """A little of everything: embedding, blocks with and without bias, Conv1D, fused experts, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False), "up_proj": nn.Linear(8, 12)})
            for _ in range(2)
        )
        self.down = conv1d(12, 8)
        self.experts = nn.ParameterDict({"gate_up": nn.Parameter(torch.randn(2, 8, 10) * 0.1)})
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 23, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + self.down(block["up_proj"](block["q_proj"](x)).tanh())
        left, right = (x @ self.experts["gate_up"][0]).chunk(2, dim=-1)
        out: Tensor = self.lm_head(self.norm(x + (left * right).mean(-1, keepdim=True)))
        return out


def tower(*, tied: bool = False) -> Tower:
    torch.manual_seed(0)
    model = Tower()
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


TOWER_IDS = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))


class Branches(nn.Module):
    """Two layers, of which one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(7, 9), nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.used(x))
