"""See a frozen weight's gradient in the backward passes of a step, and move the weight by it afterwards.

What is kept of it and which direction it gives is module `residuals`'; G is made a block of rows at a time,
never whole. The residual of low-rank layers (module `complement`) and the warm start by steps in place
(`in_place`) both move weights by it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from relora.method.complement_report import ComplementReport, LayerComplement
from relora.method.ranks import num_ranks, sum_over_ranks_
from relora.method.residuals import Pass, Residual
from relora.method.shards import first_row, reduce_over_shards_


class Movable(Protocol):
    """A weight that moves a block of rows at a time, at its master precision."""

    name: str
    weight: nn.Parameter

    @property
    def weight_momentum(self) -> Tensor | None:
        """What a residual that keeps one has for this weight, (out_features, in_features)."""

    @property
    def out_features(self) -> int:
        """Rows."""

    @property
    def in_features(self) -> int:
        """Columns."""

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices of the rows that are here: in a backward pass all."""

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

    def __init__(self, base: Movable, residual: Residual, *, seed: int = 0) -> None:
        self.num_passes = 0
        self.num_rows = 0
        self.num_non_finite = torch.zeros((), dtype=torch.int64, device="cpu")
        self._base = base
        self._residual = residual
        self._votes: Tensor | None = None
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._is_closed = False

    @property
    def held(self) -> Tensor:
        """Votes, sums or the momentum so far, (out_features, in_features); without a backward pass zeros, or
        the momentum that was.
        """
        if self._residual.keeps_momentum:
            momentum = self._base.weight_momentum
            assert momentum is not None
            return momentum
        if self._votes is None:
            weight, shape = self._base.weight, (self._base.out_features, self._base.in_features)
            self._votes = torch.zeros(shape, dtype=self._residual.dtype(weight.dtype), device=weight.device)
        return self._votes

    def observe(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Add one backward pass; none once the step is over."""
        if self._is_closed:
            return None
        bad = torch.zeros((), dtype=torch.int64, device=gradient.device)
        products: list[Tensor] = []
        if self.num_passes == 0:
            self._residual.begin_(self.held, num_ranks())
        place = Pass(num_before=self.num_passes, world_size=num_ranks(), generator=self._random)
        for rows in self._base.row_blocks():
            block, product = self._split(gradient[:, rows].T @ x)
            if product is not None:
                products.append(product)
            is_bad = ~block.isfinite()
            bad += is_bad.sum()
            self._residual.add_(self.held[rows], block.masked_fill_(is_bad, 0), place)
        self.num_non_finite = self.num_non_finite.to(bad.device) + bad
        self.num_passes += 1
        self.num_rows += len(x)
        self._end_look()
        return torch.cat(products) if products else None

    def _split(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the part of some rows of the gradient that is to be stepped on, in float32 at least; and the
        rows in the coordinates of the rest, where there is one.
        """
        return block if block.dtype == torch.float64 else block.float(), None

    @property
    def _random(self) -> torch.Generator | None:
        if self._generator is None and self._residual.keeps_momentum:
            self._generator = torch.Generator(self._base.weight.device).manual_seed(self._seed)
        return self._generator

    def close(self) -> None:
        """Take note of nothing any more: the step is over, whatever graphs of it are still around."""
        self._is_closed = True

    def _begin_move(self) -> None:
        """Prepare for `_outside`; every rank calls it once a step."""

    def _end_look(self) -> None:
        """Let go of what `observe` or `move_` needed."""

    def _outside(self, momentum: Tensor) -> Tensor:
        """Return the part of a momentum, or of what came of it, that is to be stepped on now."""
        return momentum

    def shared(self) -> Tensor:
        """Return what is held as this rank hands it to the others, which may have seen what it did not."""
        if self.num_passes == 0:
            self._residual.begin_(self.held, num_ranks())
        return self._residual.to_share(self.held, num_ranks())

    def forget_(self) -> int:
        """Forget the momentum, if there is one: a step that is not taken has gone into it and does not come
        out again. Returns how many there are.
        """
        if not self._residual.keeps_momentum:
            return 0
        self.held.zero_()
        return 1

    @property
    def flops(self) -> int:
        """What looking has cost so far: 2 out in a token."""
        return 2 * self._base.out_features * self._base.in_features * self.num_rows

    @property
    def _flops_of_a_step(self) -> int:
        """What making a direction costs."""
        return self._residual.flops(self._base.out_features, self._base.in_features)

    def move_(
        self, held: Tensor, size: float | Tensor, *, was_seen: Tensor, keep: float = 1.0
    ) -> LayerComplement:
        """Take `size` times the direction of what all ranks hold from the weight, at master precision.

        Args:
            held: The sum over ranks of `shared`.
            size: Of the step.
            was_seen: Whether any rank has seen the layer in this step, 0-d: a momentum outlasts steps in
                which none has, and the weight then stays where it is.
            keep: What weight decay leaves of the weight.

        Returns:
            What moved, read back from the weight.
        """
        base, num_non_finite = self._base, self.num_non_finite
        self._begin_move()
        keeps_momentum = self._residual.keeps_momentum
        if keeps_momentum:  # a sum over passes or ranks may have overflown: it would never heal
            is_bad = ~held.isfinite()
            held.masked_fill_(is_bad, 0)
            num_non_finite = num_non_finite.to(held.device) + is_bad.sum()
        directions = self._residual.directions(self._outside(held) if keeps_momentum else held)
        moved = torch.zeros((), dtype=torch.int64, device=held.device)
        square = torch.zeros((), dtype=torch.float32, device=held.device)
        base.drop_stale_residual_()
        first = first_row(base.weight)
        for rows in base.row_blocks():
            before = base.master_rows(rows).clone()
            direction = directions(slice(first + rows.start, first + rows.stop))
            if keeps_momentum:
                direction = torch.where(was_seen.to(direction.device), self._outside(direction), 0)
            step = direction.to(before.dtype) * size
            base.write_master_rows_(rows, before * keep - step if keep != 1 else before - step)
            change = base.master_rows(rows) - before
            moved += change.count_nonzero()
            square += change.float().square().sum()
        base.claim_residual_()
        self._end_look()
        for total in (moved, square):
            reduce_over_shards_(total, base.weight, "sum")
        return LayerComplement(
            name=base.name,
            entries=held.numel(),
            moved=moved,
            square=square,
            non_finite=num_non_finite,
            flops=self.flops + self._flops_of_a_step,
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
    with torch.autocast(shared[0].device.type, enabled=False):
        layers = tuple(
            observer.move_(held, size, was_seen=seen > 0, keep=keep)
            for observer, held, size, seen in zip(observers, shared, sizes, passes.unbind(), strict=True)
        )
    return ComplementReport(step=step, residual=residual, layers=layers, passes=passes)
