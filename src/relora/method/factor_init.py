"""How a new lora_A is drawn, at injection and at every restart (the init policy).

Each policy also knows the root mean square of the entries it draws, because the step that one Adam step on
lora_B makes in the weight is `scaling * lr * sqrt(rank) * rms(lora_A)`, and the "matched" scaling rule sets
that to the learning rate itself. A new policy is one more entry of `FACTOR_INITS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from relora.method.cover import column_rows, cover_rows
from relora.method.seeds import derived_generator
from relora.method.threads import one_thread

_BLOCK = 1024  # columns of lora_A that are solved for at once


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which lora_A is to be drawn: what its numbers are a function of."""

    rank: int
    in_features: int
    seed: int
    restart_index: int
    name: str
    """The layer's."""
    device: torch.device
    """Where linear algebra may run: it decides how fast and how numbers are rounded, not which are drawn."""

    def generator(self, purpose: str = "lora_A") -> torch.Generator:
        """Return a CPU generator of this draw's own."""
        return derived_generator(self.seed, self.restart_index, self.name, purpose)


@dataclass(frozen=True, kw_only=True)
class FactorInit:
    """One way of drawing lora_A."""

    draw: Callable[[Draw], Tensor]
    """Returns a float32 tensor of shape (rank, in_features), on the CPU or the draw's device."""
    rms: Callable[[int], float]
    """in_features -> expected root mean square of an entry."""
    is_made_on_device: bool = False
    """Whether a GPU's linear algebra has a part in it, whose last bits are the GPU's own."""
    needs_gradient: bool = False
    """Whether a restart replaces the draw by rows made of the base's gradient, where a layer has one."""


def _blank(rows: int, columns: int) -> Tensor:
    # Named, since torch's defaults are the caller's: `with torch.device("cuda")`, `set_default_dtype`.
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def _kaiming(draw: Draw) -> Tensor:
    # Kaiming-uniform with a = sqrt(5) and fan_in = in_features is U(-1/sqrt(in), 1/sqrt(in)) (paper 2).
    bound = 1 / math.sqrt(draw.in_features)
    return _blank(draw.rank, draw.in_features).uniform_(-bound, bound, generator=draw.generator())


def _orthonormal(draw: Draw) -> Tensor:
    gaussian = _blank(draw.in_features, draw.rank).normal_(generator=draw.generator())
    return orthonormal_rows(gaussian.to(draw.device)) if draw.device.type == "cuda" else _qr_rows(gaussian)


def orthonormal_rows(gaussian: Tensor) -> Tensor:
    """Orthonormalise columns on their device, by Cholesky QR done twice in float64.

    G = Q R with a positive diagonal of R has R^T = L, where L L^T = G^T G, and Q^T = L^-1 G^T: in exact
    arithmetic what `init="orthonormal"` computes on the CPU, which rounds otherwise.

    Args:
        gaussian: (in_features, rank) float32, rank <= in_features.

    Returns:
        (rank, in_features) float32 on the same device; made on the CPU if G^T G is singular in float64.
    """
    columns, failures = gaussian.to(torch.float64, copy=True), []
    for _ in range(2):  # once leaves errors of eps cond(G)^2
        lower, failure = torch.linalg.cholesky_ex(columns.T @ columns)
        failures.append(failure)
        for block in columns.split(_BLOCK):  # in place: one float64 copy of lora_A, as a merge has
            block.copy_(torch.linalg.solve_triangular(lower.T, block, upper=True, left=False))
    if bool((torch.stack(failures) == 0).all() & columns.isfinite().all()):
        return columns.T.to(torch.float32, memory_format=torch.contiguous_format)
    return _qr_rows(gaussian.cpu()).to(gaussian.device)


def _qr_rows(gaussian: Tensor) -> Tensor:
    with one_thread():
        columns, triangle = torch.linalg.qr(gaussian)
    # The sign of R's diagonal is the only freedom of QR; fixing it makes the rows uniformly distributed.
    rows: Tensor = (columns * triangle.diagonal().sign()).T.contiguous()
    return rows


def _cover(draw: Draw) -> Tensor:
    return cover_rows(draw.rank, draw.in_features, index=draw.restart_index, key=(draw.seed, draw.name))


def _columns(draw: Draw) -> Tensor:
    return column_rows(draw.rank, draw.in_features, index=draw.restart_index, key=(draw.seed, draw.name))


def _orthonormal_rms(in_features: int) -> float:
    return 1 / math.sqrt(in_features)


FACTOR_INITS: dict[str, FactorInit] = {
    "kaiming": FactorInit(draw=_kaiming, rms=lambda in_features: 1 / math.sqrt(3 * in_features)),
    "orthonormal": FactorInit(draw=_orthonormal, rms=_orthonormal_rms, is_made_on_device=True),
    "cover": FactorInit(draw=_cover, rms=_orthonormal_rms),
    "columns": FactorInit(draw=_columns, rms=_orthonormal_rms),
    # Random rows at injection, and where no gradient was seen; module `gradient_init` has the rest.
    "gradient": FactorInit(
        draw=_orthonormal, rms=_orthonormal_rms, is_made_on_device=True, needs_gradient=True
    ),
}
