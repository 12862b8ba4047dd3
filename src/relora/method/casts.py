"""The dtype a layer computes in, and one cast of an input for all layers that are given it."""

import weakref
from typing import Self

import torch
from torch import Tensor


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype a layer's products run in: autocast's where it is on, the input's elsewhere."""
    kind = input.device.type
    is_cast = input.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else input.dtype


class InputCasts:
    """Casts an input once for all layers that are given it one after the other (q, k, v; gate, up).

    Under autocast each of them would make, and keep for its backward, a copy of its own. The last cast is
    remembered weakly: it lives as long as some layer keeps it. It counts for the very tensor it was made of,
    unwritten since, in the same grad mode.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def __call__(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `input` in `dtype`."""
        # The compiler sees equal casts by itself, and inference keeps nothing.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or input.is_inference():
            return input.to(dtype)
        needs_grad = input.requires_grad and torch.is_grad_enabled()
        if self._last is not None:
            source, version, made = self._last[0](), self._last[1], self._last[2]()
            is_current = source is input and version == input._version
            if made is not None and is_current and made.dtype == dtype and made.requires_grad == needs_grad:
                return made
        made = input.to(dtype)
        self._last = (weakref.ref(input), input._version, weakref.ref(made))
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copy and pickle it as a new one."""
        return type(self), ()
