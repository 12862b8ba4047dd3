"""`init="gradient"`: a restart's lora_A from the base's gradient (hypotheses: LoQT, GaLore; mixtures as H7).

The rows of lora_A are the top right-singular vectors of G = sum of g^T x over the micro batches of the last
step of a cycle, and over ranks. G itself (out, in) is never formed. Kept is a linear sketch of it

    S = Omega^T G = sum over micro batches of (g Omega)^T x,    (k, in)

with random signs Omega (out, k) drawn from (seed, restart_index, layer name). S adds up over micro batches
and ranks, and its row space holds the top of G's (Halko, Martinsson, Tropp 2011). A power iteration would
need G again after S is complete, so more than the rank is sketched instead, k = max(2 rank, rank + 8);
docs/beyond.md says what that captures by spectrum. In that one step a layer holds 4 k in + k out bytes more.

`init_mix` of the rows are random and orthogonal to the others, and so are rows beyond the rank of G. A layer
without a finite, non-zero gradient in that step (an unrouted expert), every layer at injection, and every
layer of a restart made up for by `catch_up()`, has random orthonormal rows; the report names them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relora.method.linear import LoRALinear
from relora.method.ranks import sum_over_ranks_, take_from_first_rank_
from relora.method.seeds import derived_generator
from relora.method.shards import is_sharded, write_whole_

_OVERSAMPLING = 8  # rows at least, and at least as many as the rank


@dataclass(frozen=True, kw_only=True)
class GradientInitReport:
    """Where the rows of the new lora_A come from."""

    rows: int
    """Rows of all layers."""
    gradient_rows: int
    """Those that are singular vectors of a gradient; the others are random."""
    without_gradient: tuple[str, ...]
    """Layers without a finite, non-zero gradient in the last step of the cycle; all their rows are random."""


class Sketch:
    """The sketch of one layer's gradient in one step."""

    forms_product = False

    def __init__(self, layer: LoRALinear, *, seed: int, restart_index: int) -> None:
        self.layer = layer
        self._key = (seed, restart_index, layer.name)
        self._omega: Tensor | None = None
        self._total: Tensor | None = None

    def observe(self, x: Tensor, gradient: Tensor) -> None:
        """Add one backward pass."""
        if self._omega is None:
            self._omega = self._draw_omega().to(gradient.device)
        self.total.add_((gradient @ self._omega.to(gradient.dtype)).T @ x)

    @property
    def total(self) -> Tensor:
        """The sum so far, (k, in_features); zeros if there was no backward pass."""
        if self._total is None:
            shape = (self._width, self.layer.in_features)
            wide = torch.float64 if self.layer.lora_A.dtype == torch.float64 else torch.float32
            self._total = torch.zeros(shape, dtype=wide, device=self.layer.weight.device)
        return self._total

    @property
    def _width(self) -> int:
        layer = self.layer
        wanted = layer.config.rank + max(layer.config.rank, _OVERSAMPLING)
        return min(wanted, layer.out_features, layer.in_features)

    def _draw_omega(self) -> Tensor:
        shape = (self.layer.out_features, self._width)
        bits = torch.empty(shape, dtype=torch.int8, device="cpu")
        return bits.random_(0, 2, generator=derived_generator(*self._key, "sketch")).mul_(2).sub_(1)

    def rows(self) -> tuple[Tensor, int] | None:
        """Return lora_A and how many of its rows, the first ones, are singular vectors of the gradient.

        Returns:
            (rank, in_features) with orthonormal rows, in the layer's merge dtype, and the number; None if
            there was no finite, non-zero gradient.
        """
        config, dtype = self.layer.config, self.layer.merge_dtype
        total = self.total.to(dtype)
        if not bool(total.isfinite().all() & total.any()):
            return None
        # S^T = Q R, so S = R^T Q^T, whose small factor has the singular values.
        basis, triangle = torch.linalg.qr(total.T)
        _, values, right = torch.linalg.svd(triangle.T)
        noise = len(values) * torch.finfo(torch.float32).eps
        num_found = int((values > noise * values[0]).sum())
        kept = min(config.rank - round(config.init_mix * config.rank), num_found)
        top = right[:kept] @ basis.T
        gaussian = torch.empty(config.rank - kept, self.layer.in_features, dtype=torch.float32, device="cpu")
        gaussian.normal_(generator=derived_generator(*self._key, "exploration"))
        return _with_signs(torch.cat([top, _orthonormal_beside(gaussian.to(top), top)])), kept


def _with_signs(rows: Tensor) -> Tensor:
    """Turn each row so that its largest entry is positive, a sign that SVD and QR leave to the library.

    With `reset="none"` lora_B's moments go on beside the new rows, so that the sign matters.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()


def _orthonormal_beside(rows: Tensor, taken: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows' part orthogonal to `taken`, whose rows are orthonormal."""
    for _ in range(2):  # once leaves rounding errors of the size that was taken away
        rows = rows - (rows @ taken.T) @ taken
    basis: Tensor = torch.linalg.qr(rows.T)[0]
    return basis.T


@torch.no_grad()
def take_gradient_rows_(layers: Sequence[LoRALinear], sketches: Sequence[Sketch]) -> GradientInitReport:
    """Give layers that have just been re-initialised the rows their gradients call for.

    Args:
        layers: All layers of a restart.
        sketches: Of the same layers, or none at all, where no step has been observed.
    """
    sum_over_ranks_([sketch.total for sketch in sketches])
    num_gradient_rows: dict[LoRALinear, int] = {}
    for sketch in sketches:
        drawn = sketch.rows()
        if drawn is not None:
            rows, num_gradient_rows[sketch.layer] = drawn
            write_whole_(sketch.layer.lora_A, rows)
    # Ranks have the same sums; whether their linear algebra has the same bits is not left to chance. (A
    # sharded lora_A is taken from the first rank before it is cut.)
    made = [layer.lora_A.detach() for layer in num_gradient_rows]
    take_from_first_rank_([lora_A for lora_A in made if not is_sharded(lora_A)])
    return GradientInitReport(
        rows=sum(layer.config.rank for layer in layers),
        gradient_rows=sum(num_gradient_rows.values()),
        without_gradient=tuple(layer.name for layer in layers if layer not in num_gradient_rows),
    )
