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
    """Entries of G_perp on this rank that were not finite and cast no vote, int64."""


@dataclass(frozen=True, kw_only=True)
class ComplementReport:
    """What one step on the complement did, by layer and in total."""

    step: int
    residual: str
    layers: tuple[LayerComplement, ...]
    passes: Tensor
    """Backward passes through each layer, over all ranks, int64."""

    @property
    def num_layers(self) -> int:
        """Layers observed."""
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
            "without_backward": list(self.without_backward),
        }
