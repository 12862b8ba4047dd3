"""Where each optimizer family keeps its memory of a parameter: one adapter a family.

A reset that does not know an optimizer's state would silently do nothing, or the opposite of what it says
(zeroing the *codes* of an 8-bit state does not zero the state). So a family without an adapter is refused,
and so is a state tensor an adapter does not name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from relora.errors import ConfigError
from relora.method.plugins import load_plugins
from relora.method.shards import local, own_part, whole

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerAdapter:
    """How one optimizer family stores its state; subclass it where values are stored encoded."""

    optimizer: type[Optimizer]
    """The family; subclasses of it are served too, unless they have an adapter of their own."""
    moments: tuple[str, ...]
    """State keys that hold what is remembered of past gradients. The first of them that a parameter has
    decides, by its magnitude, which entries a coupled mask prunes."""
    step: str | None = None
    """State key of the per-parameter step count, if there is one."""
    auxiliary: tuple[str, ...] = ()
    """State keys that only serve to decode the moments; a reset leaves them as they are."""
    first: tuple[str, ...] = ()
    """Those of the moments that are linear in past gradients; reset="transport" carries them."""
    second: tuple[str, ...] = ()
    """Those that average squares of past gradients, or their maxima."""
    write_tolerance: float = 0.0
    """How far `read` may be from what `write_` was given, over its largest value; 0 unless encoded."""

    def read(self, state: State, moment: str) -> Tensor:
        """Return the values of a moment as a floating-point tensor, decoded if need be, gathered if sharded.

        Raises:
            ConfigError: if they are stored in a way this adapter does not decode.
        """
        values = state[moment]
        assert isinstance(values, Tensor)
        values = whole(values)
        is_wrapper = hasattr(values, "__tensor_flatten__")  # quantised
        if is_wrapper or not values.is_floating_point():
            stored_as = type(values).__name__ if is_wrapper else values.dtype
            raise ConfigError(
                f"optimizer state {moment!r} is stored as {stored_as}, which the adapter for "
                f"{self.optimizer.__name__} does not decode; register one whose read and clear_ do "
                "(relora.method.adapters)"
            )
        return values

    def clear_(self, state: State, moment: str, mask: Tensor) -> None:
        """Set the entries of a moment where `mask` (bool, the moment's shape) is true to 0."""
        local(state[moment]).masked_fill_(own_part(mask, state[moment]), 0)

    def obstacle(self, state: State, moment: str, method: str) -> str | None:
        """Say why this moment cannot be reset by `method`, None if it can; asked before anything changes."""
        del state, moment, method
        return None

    def write_(self, state: State, moment: str, values: Tensor) -> None:
        """Store the values of a moment, in the shape and dtype that `read` returns, encoded if need be."""
        local(state[moment]).copy_(own_part(values, state[moment]))

    def reset_step_(self, state: State) -> bool:
        """Set the step count to 0 in place; return whether there was one."""
        if self.step is None or self.step not in state:
            return False
        if isinstance(state[self.step], Tensor):
            state[self.step].zero_()
        else:
            state[self.step] = 0
        return True

    def held_moments(self, state: State) -> tuple[str, ...]:
        """Return the moments that a state really holds, refusing tensors this adapter does not know."""
        known = {*self.moments, self.step, *self.auxiliary}
        unknown = [key for key, value in state.items() if holds_values(value) and key not in known]
        if unknown:
            raise ConfigError(
                f"the adapter for {self.optimizer.__name__} does not know the state "
                f"{', '.join(map(repr, unknown))}; register one that names it (relora.method.adapters)"
            )
        return tuple(moment for moment in self.moments if state.get(moment) is not None)


def holds_values(value: object) -> bool:
    """Tell whether a state entry is a tensor of more than one value, or a container that holds one."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, Mapping):
        return any(map(holds_values, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_values, value))


_ADAPTERS: dict[type[Optimizer], OptimizerAdapter] = {}


def register_optimizer_adapter(adapter: OptimizerAdapter) -> None:
    """Make resets work for an optimizer family; a later adapter for the same class replaces the earlier."""
    _ADAPTERS[adapter.optimizer] = adapter


def adapter_for(optimizer: Optimizer) -> OptimizerAdapter:
    """Return the adapter of an optimizer's class, or of the nearest base class that has one.

    Raises:
        ConfigError: if there is none, with how to register one.
    """
    # A foreign optimizer's package is imported already; what knows its states is only now.
    for package in (None, *{family.__module__.partition(".")[0] for family in type(optimizer).__mro__}):
        if package is None or load_plugins("relora.optimizers", package):
            for family in type(optimizer).__mro__:
                if family in _ADAPTERS:
                    return _ADAPTERS[family]
    known = ", ".join(sorted(family.__name__ for family in _ADAPTERS))
    name = type(optimizer).__name__
    raise ConfigError(
        f"no optimizer reset is known for {name} (known: {known}). Tell where it keeps its state: "
        "from relora.method.adapters import OptimizerAdapter, register_optimizer_adapter; "
        f"register_optimizer_adapter(OptimizerAdapter(optimizer={name}, moments=('exp_avg', ...), "
        "step='step'))"
    )


# AdamW derives from Adam, and the foreach, fused and amsgrad variants keep the same keys.
for _adam_family in (torch.optim.Adam, torch.optim.AdamW):
    register_optimizer_adapter(
        OptimizerAdapter(
            optimizer=_adam_family,
            moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            step="step",
            first=("exp_avg",),
            second=("exp_avg_sq", "max_exp_avg_sq"),
        )
    )
for _momentum_family in (torch.optim.SGD, torch.optim.Muon):
    register_optimizer_adapter(
        OptimizerAdapter(optimizer=_momentum_family, moments=("momentum_buffer",), first=("momentum_buffer",))
    )
# Its factored second moments are a row and a column; each is pruned by its own magnitude.
register_optimizer_adapter(
    OptimizerAdapter(optimizer=torch.optim.Adafactor, moments=("row_var", "col_var", "variance"), step="step")
)
