"""The momentum that a residual keeps of a frozen weight, under every move, cast, save and load.

It is neither parameter nor buffer: between the backward passes of a step it holds this rank's own share, and
DistributedDataParallel hands the first rank's buffers to all at the next forward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor

from relora.method.base import FrozenBase
from relora.method.master import keeping
from relora.method.residuals import RESIDUALS

_NAME = "weight_momentum"


class BaseWithMomentum(FrozenBase):
    """A frozen weight, with a momentum where `residual` keeps one."""

    weight_momentum: Tensor | None
    """(out_features, in_features) whichever way the weight lies, in the dtype of the residual."""

    def _add_momentum_(self) -> None:
        """Begin with zeros, before the weight is stored as the config asks."""
        residual = RESIDUALS.get(self.config.residual)
        self.weight_momentum = None
        if residual is not None and residual.keeps_momentum:
            dtype, device = residual.dtype(self.weight.dtype), self.weight.device
            self.weight_momentum = torch.zeros(
                self.out_features, self.in_features, dtype=dtype, device=device
            )

    def bring_momentum_(self) -> None:
        """Move the momentum to where the weight is: `fully_shard` moves parameters and buffers alone."""
        momentum, device = self.weight_momentum, self.weight.device
        if momentum is not None and momentum.device != device:
            is_empty = momentum.is_meta
            self.weight_momentum = (
                torch.zeros_like(momentum, device=device) if is_empty else momentum.to(device)
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.weight_momentum is not None:
            was_meta = self.weight_momentum.is_meta
            moved = keeping(fn, wide=(), same=(self.weight_momentum,))(self.weight_momentum)
            self.weight_momentum = moved.zero_() if was_meta else moved
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_momentum is not None:
            destination[prefix + _NAME] = self.weight_momentum

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        entries, (_, strict, missing, _, errors) = cast(dict[str, Any], state_dict), args
        name, mine = prefix + _NAME, self.weight_momentum
        loaded = entries.pop(name, None) if mine is not None else None
        super()._load_from_state_dict(entries, prefix, *args, **kwargs)
        if mine is None:
            return
        self.bring_momentum_()  # the weight is no longer meta, where it was assigned
        mine = self.weight_momentum
        assert mine is not None
        if loaded is None:
            missing += [name] if strict else []
        elif loaded.shape != mine.shape:
            errors.append(
                f"size mismatch for {name}: {tuple(loaded.shape)} in the checkpoint, {tuple(mine.shape)} here"
            )
        else:
            mine.copy_(loaded)
