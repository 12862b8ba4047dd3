"""What becomes of a frozen weight's gradient: how a step's part of it is held, and which direction it gives.

What a step's backward passes show is held as votes of an int8 each ("sign"), as sums in bf16 ("column"), or
goes at once into a momentum in bf16 that lasts from step to step ("muon"). After the step it becomes a
direction of RMS 1 at most (`RESIDUALS`). Who looks at the passes and moves the weights is module
`gradient_observer`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Directions = Callable[[slice], Tensor]
"""Returns rows of a direction D, (rows, in_features), in float32 at least."""

_INT8_MAX = 127
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # as torch.optim.Muon has them
_NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Which backward pass of a step it is, and where."""

    num_before: int
    """Passes of the step before it, through the same layer on this rank."""
    world_size: int
    """Ranks whose shares will be added."""
    generator: torch.Generator | None
    """On the layer's device, for what is rounded at random; None where no momentum is kept."""


class Residual(Protocol):
    """How the gradients of a step are held and what direction comes of them."""

    keeps_momentum: bool
    """Whether what is held outlasts the step; the layer then has a tensor for it."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return that of what is held, one element a weight."""

    def begin_(self, held: Tensor, world_size: int) -> None:
        """Begin a step, on this rank of so many."""

    def add_(self, held: Tensor, rows: Tensor, place: Pass) -> None:
        """Add rows of one backward pass."""

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return what may be summed over so many ranks."""

    def directions(self, held: Tensor) -> Directions:
        """Return D by rows, of what all ranks hold together."""

    def flops(self, out_features: int, in_features: int) -> int:
        """Return what making D costs in matrix products."""


class _OfOneStep:
    """What is begun anew in each step, and made a direction of without products."""

    keeps_momentum = False

    def begin_(self, held: Tensor, world_size: int) -> None:
        """Nothing is left of the step before."""

    def flops(self, out_features: int, in_features: int) -> int:
        """Return 0."""
        del out_features, in_features
        return 0


class SignVotes(_OfOneStep):
    """The sign of the sum of signs, an int8 each."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return int8."""
        del weight
        return torch.int8

    def add_(self, held: Tensor, rows: Tensor, place: Pass) -> None:
        """Add votes; they saturate at 127, far from the tie that would decide."""
        if place.num_before >= _INT8_MAX:
            held.clamp_(1 - _INT8_MAX, _INT8_MAX - 1)
        held.add_(rows.sign().to(torch.int8))

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return votes that cannot overflow: each rank's saturate at 127 / world_size, above which a rank
        with that many micro batches counts as unanimous.
        """
        if world_size > _INT8_MAX:
            return held.sign().to(torch.int32)
        limit = _INT8_MAX // world_size
        return held.clamp_(-limit, limit)

    def directions(self, held: Tensor) -> Directions:
        """Return -1, 0 or 1."""
        return lambda rows: held[rows].sign().float()


class ColumnSum(_OfOneStep):
    """The sum of gradients with columns of RMS 1, in bf16."""

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return bfloat16."""
        del weight
        return torch.bfloat16

    def add_(self, held: Tensor, rows: Tensor, place: Pass) -> None:
        """Add gradients."""
        del place
        held.add_(rows)

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return the sum as it is."""
        del world_size
        return held

    def directions(self, held: Tensor) -> Directions:
        """Return rows over the RMS of each column; 0 for a column of zeros."""
        norms = torch.linalg.vector_norm(held, dim=0, dtype=torch.float32)
        scale = torch.where(norms > 0, math.sqrt(len(held)) / norms, 0)
        return lambda rows: held[rows] * scale


class MuonMomentum:
    """The orthogonalised running mean of gradients, in bf16 (float64 beside a weight of float64).

    Each rank adds its gradient to its own copy, of which it first leaves 1 / world_size, so that their sum is
    the same mean again and nothing but it need be held. Muon without the look ahead (Jordan et al. 2024), its
    direction scaled to an RMS of 0.2, about that of AdamW's (Liu et al. 2025).
    """

    keeps_momentum = True
    decay = 0.9
    rms = 0.2

    def dtype(self, weight: torch.dtype) -> torch.dtype:
        """Return bfloat16, or float64 for float64."""
        return torch.float64 if weight == torch.float64 else torch.bfloat16

    def begin_(self, held: Tensor, world_size: int) -> None:
        """Leave this rank's share of the step before."""
        held.mul_(self.decay / world_size)

    def add_(self, held: Tensor, rows: Tensor, place: Pass) -> None:
        """Add gradients. In bf16 what one of many micro batches adds may be less than the last bit of the
        mean: it is rounded up or down at random, so that what is lost is nothing on average.
        """
        if held.dtype == torch.bfloat16:
            assert place.generator is not None
            share = torch.add(held, rows, alpha=(1 - self.decay) / place.world_size)
            held.copy_(rounded_at_random(share, place.generator))
        else:
            held.add_(rows, alpha=(1 - self.decay) / place.world_size)

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return the share as it is: summed in place, it is every rank's mean."""
        del world_size
        return held

    def directions(self, held: Tensor) -> Directions:
        """Return U V^T of the mean's singular vectors, all of its singular values about 1, times
        0.2 sqrt(max(out, in)).
        """
        whole = orthogonalised(held).mul_(self.rms * math.sqrt(max(held.shape)))
        return lambda rows: whole[rows]

    def flops(self, out_features: int, in_features: int) -> int:
        """Return those of the iterations."""
        least, most = sorted((out_features, in_features))
        return _NEWTON_SCHULZ_STEPS * 2 * least**2 * (2 * most + least)


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return finite float32 values rounded to bf16, each to one of its two neighbours, the nearer the
    likelier, so that the mean is the value.
    """
    bits = values.contiguous().view(torch.int32)
    below = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return (bits + below).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix's own singular vectors with singular values near 1, by five Newton-Schulz iterations.

    Args:
        matrix: (rows, columns). On a GPU it is worked on in bf16, float64 excepted; else in float32 at least.

    Returns:
        (rows, columns), float32 at least; singular values of 0.68 to 1.13, where the matrix's are not too
        small for its norm; zeros for zeros.
    """
    is_fast = matrix.device.type == "cuda" and matrix.dtype != torch.float64
    x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = x / x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)  # or squares of small numbers would be 0
    x = x / x.norm().clamp_min(1)
    x = x.to(torch.bfloat16) if is_fast else x
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(torch.promote_types(x.dtype, torch.float32))


RESIDUALS: dict[str, Residual] = {"sign": SignVotes(), "column": ColumnSum(), "muon": MuonMomentum()}
