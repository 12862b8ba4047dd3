"""Full rank without a gradient of the weight: linear layers move by what the backward pass shows (H5, SCALE).

    W <- (1 - lr * decay) W - lr * scale * D,    D of RMS 1 at most, as for `residual`

of G = g^T x, the whole gradient of the layer's weight. The weights are frozen for autograd, so there is no
gradient of them. In its place is held, made a block of rows at a time and summed over ranks:

    "sign"      1 byte a weight, from a layer's backward to the step
    "column"    2 bytes a weight, likewise
    "muon"      2 bytes a weight from step to step, the momentum, and nothing else

DistributedDataParallel, which must be built after this, knows nothing of the weights. Eager mode only, as
everything that observes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.complement_report import ComplementReport
from relora.method.gradient_observer import GradientObserver, move_together_
from relora.method.observe import observed, refuse_compiled
from relora.method.residuals import RESIDUALS
from relora.method.seeds import derived_seed
from relora.method.shards import is_sharded

_BLOCK_ENTRIES = 1 << 22


class PlainWeight:
    """The weight of a plain linear layer (or a transposed `Conv1D`), (out_features, in_features)."""

    def __init__(self, name: str, layer: nn.Module, *, momentum: "MomentumOf | None" = None) -> None:
        self.name, self.layer = name, layer
        self.weight = layer.get_parameter("weight")
        self._momentum = momentum
        self._is_transposed = not isinstance(layer, nn.Linear)

    @property
    def weight_momentum(self) -> Tensor | None:
        """Its momentum, (out_features, in_features) whichever way the weight lies, where one is kept."""
        return None if self._momentum is None else self._momentum(self)

    @property
    def _rows(self) -> Tensor:
        weight = self.weight.detach()
        return weight.T if self._is_transposed else weight

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self._rows.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self._rows.shape[1]

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices of output features."""
        step = max(1, _BLOCK_ENTRIES // self.in_features)
        for first in range(0, self.out_features, step):
            yield slice(first, min(first + step, self.out_features))

    def master_rows(self, rows: slice) -> Tensor:
        """Return rows of the weight, which is its own master."""
        return self._rows[rows]

    def write_master_rows_(self, rows: slice, value: Tensor) -> None:
        """Store rows of the weight."""
        self._rows[rows] = value

    def drop_stale_residual_(self) -> None:
        """Nothing is kept beside the weight."""

    def claim_residual_(self) -> None:
        """Nothing is kept beside the weight."""


MomentumOf = Callable[[PlainWeight], Tensor]
"""Returns where a weight's momentum is kept."""


class InPlace:
    """Trains the weights of some layers without gradients of them, from its making until `release_`.

    Args:
        model: The model, not compiled.
        layers: Plain linear layers of it, by full name; no biases are touched.
        kind: One of RESIDUALS.
        momentum: For a kind that keeps one.
        seed: Of what is rounded at random, with the step and the layer's name.

    Raises:
        ConfigError: if the model is compiled, a weight is sharded, or one is of half precision, which would
            round steps away.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        kind: str,
        momentum: MomentumOf | None = None,
        seed: int = 0,
    ) -> None:
        assert RESIDUALS[kind].keeps_momentum == (momentum is not None)
        refuse_compiled(model, f"training by {kind!r} steps in place")
        self._kind, self._seed = kind, seed
        self._weights = [PlainWeight(name, layer, momentum=momentum) for name, layer in layers.items()]
        for weight in self._weights:
            if weight.weight.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"training by {kind!r} steps in place needs weights in float32, but {weight.name} is "
                    f"{weight.weight.dtype}: most of a step would be rounded away"
                )
            if is_sharded(weight.weight):
                raise ConfigError(
                    f"training by {kind!r} steps in place needs whole weights, but {weight.name} is sharded: "
                    "use DistributedDataParallel"
                )
            weight.weight.requires_grad_(False)
        self._observers: dict[nn.Module, GradientObserver] = {}
        self._hooks = [
            weight.layer.register_forward_hook(self._watch, with_kwargs=True) for weight in self._weights
        ]
        self.begin(0)

    def _watch(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return observed(output, x, (self._observers[layer],))

    def begin(self, steps_done: int) -> None:
        """Begin the step after so many; what was seen since the last begins is seen no more."""
        for observer in self._observers.values():
            observer.close()
        residual = RESIDUALS[self._kind]
        self._observers = {
            weight.layer: GradientObserver(
                weight, residual, seed=derived_seed(self._seed, steps_done, weight.name, "in place")
            )
            for weight in self._weights
        }

    def hold_(self) -> None:
        """Make what the next backward passes go into, which the first of them makes otherwise."""
        for observer in self._observers.values():
            _ = observer.held

    def drop(self, step: int) -> None:
        """Forget what was seen of a step that is not taken, and momenta that it has gone into."""
        for observer in self._observers.values():
            observer.forget_()
        self.begin(step)

    @torch.no_grad()
    def step_(self, step: int, *, size: float, keep: float = 1.0) -> ComplementReport:
        """Move every weight by what was seen of the step; every rank calls it.

        Args:
            step: The step just taken.
            size: Learning rate times scale.
            keep: What weight decay leaves of a weight.

        Returns:
            What moved, and what it took.

        Raises:
            ConfigError: if no backward pass went through any layer; nothing has moved then.
        """
        observers = list(self._observers.values())
        if not any(observer.num_passes for observer in observers):
            raise ConfigError(
                f"step {step}: training by {self._kind!r} steps in place saw no backward pass through any of "
                f"{len(observers)} layers; is the model compiled?"
            )
        report = move_together_(observers, [size] * len(observers), step=step, residual=self._kind, keep=keep)
        self.begin(step)
        return report

    def release_(self) -> None:
        """Give the weights back to autograd, and forget them."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.weight.requires_grad_(True)
        self._weights.clear()
        self._observers.clear()
