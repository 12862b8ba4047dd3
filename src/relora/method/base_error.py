"""`carry_base_error`: at a restart lora_B takes over what it can of a coded base's error (H10, LoQT).

The device holds deq(Q), the host the exact base M, so the forward pass lacks E = M - deq(Q). Of that,
scaling * lora_B lora_A can give back what lies in lora_A's rows. With a new A, and from E of B = 0 on,

    B <- E A^T (A A^T)^-1 / scaling,    M' <- M - scaling B A,    Q <- code(M'),    E <- M - deq(Q)

three times: a least-squares fit each, and codes for what it leaves. The exact base is M' from then on: M'
plus the delta is M as before, so that merges, checkpoints, fold and spectra need to know nothing of it, and
nothing is kept beside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relora.method.linear import LoRALinear


@dataclass(frozen=True, kw_only=True)
class LayerBaseError:
    """The error of one layer's coded base, before and after lora_B has taken over its part."""

    name: str
    norm_before: float
    """Frobenius norm of what the forward pass lacked of the exact weight."""
    norm_after: float
    """The same, with the delta."""


@dataclass(frozen=True, kw_only=True)
class BaseErrorReport:
    """What lora_B took over at a restart."""

    layers: tuple[LayerBaseError, ...]

    @property
    def cancelled_fraction(self) -> float:
        """Fraction of the error's energy, over all layers, that is gone."""
        before = sum(layer.norm_before**2 for layer in self.layers)
        return 1 - sum(layer.norm_after**2 for layer in self.layers) / before if before else 0.0


@torch.no_grad()
def carry_base_error_(layers: Sequence[LoRALinear], *, rounds: int = 3) -> BaseErrorReport:
    """Let the lora_B of layers that have just been re-initialised take over their base's error.

    Args:
        layers: With a base of codes, lora_A new, lora_B 0.
        rounds: Fits, each followed by codes for what it leaves.
    """
    return BaseErrorReport(layers=tuple(_carry_layer_(layer, rounds) for layer in layers))


def _carry_layer_(layer: LoRALinear, rounds: int) -> LayerBaseError:
    dtype, device = layer.merge_dtype, layer.weight.device
    lora_A = layer.lora_A.detach().to(dtype)
    scaling = torch.as_tensor(layer.scaling, dtype=dtype, device=device).detach()
    sums = torch.zeros(2, dtype=dtype, device=device)
    layer.drop_stale_residual_()
    if scaling == 0:  # a learned one may be; then no lora_B can give anything
        fit = torch.zeros_like(lora_A.T)
    else:
        fit = torch.linalg.solve(lora_A @ lora_A.T, lora_A).T / scaling
    for rows in layer.row_blocks():
        sums += _carry_rows_(layer, rows, fit, lora_A * scaling, rounds)
    layer.claim_residual_()
    before, after = (math.sqrt(value) for value in sums.tolist())
    return LayerBaseError(name=layer.name, norm_before=before, norm_after=after)


def _carry_rows_(layer: LoRALinear, rows: slice, fit: Tensor, scaled_A: Tensor, rounds: int) -> Tensor:
    exact = layer.master_rows(rows).to(fit.dtype, copy=True)
    lacking = exact - layer.weight_rows(rows).to(fit.dtype)
    before = lacking.square().sum()
    lora_B = layer.lora_B.detach()[rows]
    for _ in range(rounds):
        lora_B.copy_(lacking @ fit)
        delta = lora_B.to(fit.dtype) @ scaled_A
        layer.write_master_rows_(rows, exact - delta)
        lacking = exact - layer.weight_rows(rows).to(fit.dtype)
    return torch.stack([before, (lacking - delta).square().sum()])
