"""Stateless steps of a frozen weight from what its layer's backward passes show of its gradient.

What a step's passes leave is held as votes of an int8 each or as sums in bf16, made a block of rows at a
time, so that no gradient is ever whole; after the step it becomes a direction of RMS 1 at most
(`RESIDUALS`). The residual of low-rank layers (module `complement`) and the warm start without optimizer
state (`state_free`) both move weights by it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.method.complement_report import ComplementReport, LayerComplement
from relora.method.ranks import num_ranks, sum_over_ranks_

_INT8_MAX = 127


class Residual(Protocol):
    """How the complement's gradients of a step are held and what direction comes of them."""

    dtype: torch.dtype
    """Of what is held, one element a weight."""

    def add_(self, held: Tensor, perp: Tensor, num_before: int) -> None:
        """Add rows of one backward pass, after `num_before` others."""

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return what may be summed over so many ranks."""

    def scale(self, held: Tensor) -> Tensor:
        """Return what `direction` needs to know of the whole matrix, broadcastable to its rows."""

    def direction(self, held: Tensor, scale: Tensor) -> Tensor:
        """Return D for rows of what is held, in float32."""


class SignVotes:
    """The sign of the sum of signs, an int8 each."""

    dtype = torch.int8

    def add_(self, held: Tensor, perp: Tensor, num_before: int) -> None:
        """Add votes; they saturate at 127, far from the tie that would decide."""
        if num_before >= _INT8_MAX:
            held.clamp_(1 - _INT8_MAX, _INT8_MAX - 1)
        held.add_(perp.sign().to(self.dtype))

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return votes that cannot overflow: each rank's saturate at 127 / world_size, above which a rank
        with that many micro batches counts as unanimous.
        """
        if world_size > _INT8_MAX:
            return held.sign().to(torch.int32)
        limit = _INT8_MAX // world_size
        return held.clamp_(-limit, limit)

    def scale(self, held: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones((), dtype=torch.float32, device=held.device)

    def direction(self, held: Tensor, scale: Tensor) -> Tensor:
        """Return -1, 0 or 1."""
        return held.sign() * scale


class ColumnSum:
    """The sum of gradients with columns of RMS 1, in bf16."""

    dtype = torch.bfloat16

    def add_(self, held: Tensor, perp: Tensor, num_before: int) -> None:
        """Add gradients."""
        del num_before
        held.add_(perp)

    def to_share(self, held: Tensor, world_size: int) -> Tensor:
        """Return the sum as it is."""
        del world_size
        return held

    def scale(self, held: Tensor) -> Tensor:
        """Return 1 over the RMS of each column; 0 for a column of zeros."""
        norms = torch.linalg.vector_norm(held, dim=0, dtype=torch.float32)
        return torch.where(norms > 0, math.sqrt(len(held)) / norms, 0)

    def direction(self, held: Tensor, scale: Tensor) -> Tensor:
        """Return the scaled rows."""
        return held * scale


RESIDUALS: dict[str, Residual] = {"sign": SignVotes(), "column": ColumnSum()}


class Movable(Protocol):
    """A weight that moves a block of rows at a time, at its master precision."""

    name: str
    weight: nn.Parameter

    @property
    def out_features(self) -> int:
        """Rows."""

    @property
    def in_features(self) -> int:
        """Columns."""

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices of rows."""

    def master_rows(self, rows: slice) -> Tensor:
        """Return rows at master precision."""

    def write_master_rows_(self, rows: slice, value: Tensor) -> None:
        """Store rows at master precision."""

    def drop_stale_residual_(self) -> None:
        """Prepare for writes."""

    def claim_residual_(self) -> None:
        """Conclude writes."""


class GradientObserver:
    """What one layer's backward passes of one step leave of its weight's gradient."""

    forms_product = False

    def __init__(self, base: Movable, residual: Residual) -> None:
        self.num_passes = 0
        self.num_rows = 0
        self.num_non_finite = torch.zeros((), dtype=torch.int64, device="cpu")
        self._base = base
        self._residual = residual
        self._held: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """Votes or sums so far, (out_features, in_features); zeros if there was no backward pass."""
        if self._held is None:
            shape = (self._base.out_features, self._base.in_features)
            self._held = torch.zeros(shape, dtype=self._residual.dtype, device=self._base.weight.device)
        return self._held

    def observe(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Add one backward pass."""
        bad = torch.zeros((), dtype=torch.int64, device=gradient.device)
        products: list[Tensor] = []
        for rows in self._base.row_blocks():
            block, product = self._split(gradient[:, rows].T @ x)
            if product is not None:
                products.append(product)
            is_bad = ~block.isfinite()
            bad += is_bad.sum()
            self._residual.add_(self.held[rows], block.masked_fill_(is_bad, 0), self.num_passes)
        self.num_non_finite = self.num_non_finite.to(bad.device) + bad
        self.num_passes += 1
        self.num_rows += len(x)
        return torch.cat(products) if products else None

    def _split(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the part of some rows of the gradient that is to be stepped on, in float32 at least; and the
        rows in the coordinates of the rest, where there is one.
        """
        return block if block.dtype == torch.float64 else block.float(), None

    def shared(self) -> Tensor:
        """Return what is held as this rank hands it to the others."""
        return self._residual.to_share(self.held, num_ranks())

    @property
    def flops(self) -> int:
        """What looking has cost so far: 2 out in a token."""
        return 2 * self._base.out_features * self._base.in_features * self.num_rows

    def move_(self, held: Tensor, size: float | Tensor, *, keep: float = 1.0) -> LayerComplement:
        """Take `size` times the direction of what all ranks hold from the weight, at master precision.

        Args:
            held: The sum over ranks of `shared`.
            size: Of the step.
            keep: What weight decay leaves of the weight.

        Returns:
            What moved, read back from the weight.
        """
        base = self._base
        scale = self._residual.scale(held)
        moved = torch.zeros((), dtype=torch.int64, device=held.device)
        square = torch.zeros((), dtype=torch.float32, device=held.device)
        base.drop_stale_residual_()
        for rows in base.row_blocks():
            before = base.master_rows(rows).clone()
            step = self._residual.direction(held[rows], scale).to(before.dtype) * size
            base.write_master_rows_(rows, before * keep - step if keep != 1 else before - step)
            change = base.master_rows(rows) - before
            moved += change.count_nonzero()
            square += change.float().square().sum()
        base.claim_residual_()
        return LayerComplement(
            name=base.name,
            entries=held.numel(),
            moved=moved,
            square=square,
            non_finite=self.num_non_finite,
            flops=self.flops,
            held_bytes=self.held.nbytes,
            shared_bytes=held.nbytes if num_ranks() > 1 else 0,
        )


@torch.no_grad()
def move_together_(
    observers: Sequence[GradientObserver],
    sizes: Sequence[float | Tensor],
    *,
    step: int,
    residual: str,
    keep: float = 1.0,
) -> ComplementReport:
    """Move each observer's weight by what all ranks have seen of it; every rank calls it.

    Args:
        observers: One at least.
        sizes: Of their steps.
        step: The step just taken.
        residual: The name of what they hold.
        keep: What weight decay leaves of a weight.

    Returns:
        What moved, and what it took.
    """
    shared = [observer.shared() for observer in observers]
    counts = [observer.num_passes for observer in observers]
    passes = torch.tensor(counts, device="cpu").to(shared[0].device)
    sum_over_ranks_([passes, *shared])
    layers = tuple(
        observer.move_(held, size, keep=keep)
        for observer, held, size in zip(observers, shared, sizes, strict=True)
    )
    return ComplementReport(step=step, residual=residual, layers=layers, passes=passes)
