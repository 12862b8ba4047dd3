"""What a step on the complement did, measured on the base; reading a number waits for the device."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerComplement:
    """What moved in one layer; tensors on the layer's device, 0-d, so that a step waits for nothing."""

    name: str
    entries: int
    moved: Tensor
    """Entries of the base that read otherwise after the step, int64."""
    square: Tensor
    """Sum of the squares of all changes, float32."""
    non_finite: Tensor
    """Entries of G_perp on this rank that were not finite and cast no vote, and of a momentum that were not,
    int64."""
    flops: int
    """What this rank has computed to see G_perp, and to make a direction of it."""
    held_bytes: int
    """What this rank has held from the layer's backward to the step; a momentum it holds for good."""
    shared_bytes: int
    """What this rank has handed to the all-reduce; 0 where it trains alone."""


@dataclass(frozen=True, kw_only=True)
class ComplementReport:
    """What one step on the complement did, by layer and in total."""

    step: int
    residual: str
    layers: tuple[LayerComplement, ...]
    passes: Tensor
    """Backward passes through each layer, over all ranks, int64."""
    num_forgotten: int = 0
    """Momenta that began anew since the report before: a step had gone into them that was not taken."""

    @property
    def num_layers(self) -> int:
        """Layers observed: all of them, or those whose turn it was."""
        return len(self.layers)

    @property
    def moved_fraction(self) -> float:
        """Fraction of all entries that the step moved."""
        return sum(int(layer.moved) for layer in self.layers) / self._entries

    @property
    def step_rms(self) -> float:
        """Root mean square of the change over all entries."""
        return math.sqrt(sum(float(layer.square) for layer in self.layers) / self._entries)

    @property
    def num_non_finite(self) -> int:
        """Entries of gradients on this rank that cast no vote because they were not finite."""
        return sum(int(layer.non_finite) for layer in self.layers)

    @property
    def without_backward(self) -> tuple[str, ...]:
        """Layers that no backward pass went through on any rank, such as an unrouted expert."""
        counts = self.passes.tolist()
        return tuple(layer.name for layer, count in zip(self.layers, counts, strict=True) if not count)

    @property
    def flops(self) -> int:
        """Operations of this rank to see G_perp, 2 out in a token and 4 out in rank a micro batch; and those
        of Newton and Schulz, with "muon".
        """
        return sum(layer.flops for layer in self.layers)

    @property
    def held_bytes(self) -> int:
        """Bytes that this rank held until the step, beside the inputs kept for the backward."""
        return sum(layer.held_bytes for layer in self.layers)

    @property
    def shared_bytes(self) -> int:
        """Bytes that this rank handed to the all-reduce."""
        return sum(layer.shared_bytes for layer in self.layers)

    def as_metrics(self) -> dict[str, float]:
        """Return what the log of a step should have: how much moved, how far, and what cast no vote."""
        names = ("moved_fraction", "step_rms", "num_non_finite")
        return {name: getattr(self, name) for name in names}

    @property
    def _entries(self) -> int:
        return sum(layer.entries for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as JSON-able values."""
        return {
            "step": self.step,
            "residual": self.residual,
            "num_layers": self.num_layers,
            "moved_fraction": self.moved_fraction,
            "step_rms": self.step_rms,
            "num_non_finite": self.num_non_finite,
            "num_forgotten": self.num_forgotten,
            "flops": self.flops,
            "held_bytes": self.held_bytes,
            "shared_bytes": self.shared_bytes,
            "without_backward": list(self.without_backward),
        }
