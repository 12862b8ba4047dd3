"""torchao: resets of its 8-bit, 4-bit and float8 optimizers (extra "torchao").

A state is a tensor subclass of codes and block-wise scales, or a plain tensor where the parameter is small.
The 4-bit table of second moments has no 0, only 1/16 to 1 of its block's largest: it can be cleared as a
whole, by its scales, and not entry by entry.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relora.errors import ConfigError
from relora.method.adapters import OptimizerAdapter, State, register_optimizer_adapter

try:
    from torchao.optim import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8
except ImportError as error:
    raise ConfigError(f"torchao cannot be imported ({error}): pip install 'relora[torchao]'") from error


@dataclass(frozen=True, kw_only=True)
class LowBitAdapter(OptimizerAdapter):
    """States with `codes`, `scale` and, but for float8, a table `qmap`."""

    def read(self, state: State, moment: str) -> Tensor:
        """Decode a moment."""
        values: Tensor = state[moment]
        return values.dequantize().float() if hasattr(values, "codes") else values

    @torch.no_grad()
    def clear_(self, state: State, moment: str, mask: Tensor) -> None:
        """Set entries to the code of 0; the others keep code and scale, and so their value."""
        values = state[moment]
        if not hasattr(values, "codes"):
            values.masked_fill_(mask, 0)
        elif (zero := _zero_code(values)) is None:
            values.scale.zero_()  # `obstacle` has allowed nothing but all of it
        elif _is_packed(values):
            pairs = mask.reshape(-1, 2)
            high = torch.where(pairs[:, 0], zero, values.codes >> 4)
            low = torch.where(pairs[:, 1], zero, values.codes & 0xF)
            values.codes.copy_((high << 4) | low)
        else:
            values.codes.view(torch.uint8).masked_fill_(mask, zero)

    def obstacle(self, state: State, moment: str, method: str) -> str | None:
        """Refuse to clear some entries of a state that has no code for 0."""
        values = state[moment]
        if method in ("zero", "none") or not hasattr(values, "codes") or _zero_code(values) is not None:
            return None
        return "its 4-bit codes have none for 0: use reset='zero' or 'none', or an 8-bit optimizer"


def _zero_code(values: Tensor) -> int | None:
    """Return the code of the value 0; None if there is none."""
    table: Tensor | None = getattr(values, "qmap", None)
    if table is None:
        return 0  # float8: all bits 0
    found = (table == 0).nonzero()
    return int(found[0]) if len(found) else None


def _is_packed(values: Tensor) -> bool:
    codes: Tensor = values.codes  # type: ignore[attr-defined]
    return codes.numel() * 2 == values.numel()


for _family in (Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8):
    register_optimizer_adapter(
        LowBitAdapter(optimizer=_family, moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), step="step")
    )
