"""bitsandbytes: NF4 for the frozen base, and resets of its 8-bit optimizers (extra "bitsandbytes").

An 8-bit state is a code, an index into a table of 256 values, times the largest magnitude of its block of
256 entries. Code 0 of a signed table stands for -0.993 of that magnitude, so clearing codes to 0 is the
opposite of a reset: what is cleared here is set to the code of the value 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relora.errors import ConfigError
from relora.method.adapters import OptimizerAdapter, State, register_optimizer_adapter
from relora.method.codecs import BLOCK, in_blocks, register_base_codec

try:
    import bitsandbytes.optim.optimizer as bnb
except ImportError as error:
    raise ConfigError(
        f"bitsandbytes cannot be imported ({error}): pip install 'relora[bitsandbytes]'"
    ) from error

_OPTIMIZER_BLOCK = 256


class NF4:
    """4-bit NormalFloat, 64 weights to a float32 scale."""

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, two in a byte, and scales, one for 64 columns."""
        blocks = in_blocks(rows.float())
        stored, scale = torch.ops.bitsandbytes.quantize_4bit(
            blocks.flatten(1).contiguous(), BLOCK, "nf4", torch.uint8
        )
        count = blocks.shape[0]
        return stored.view(count, -1), scale.view(count, -1)

    def decode(self, stored: Tensor, scale: Tensor, *, columns: int, dtype: torch.dtype) -> Tensor:
        """Look the codes up and scale them."""
        shape = (stored.shape[0], 2 * stored.shape[1])
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            stored.reshape(-1, 1), scale.reshape(-1), BLOCK, "nf4", shape, dtype
        )
        return values[:, :columns]


@dataclass(frozen=True, kw_only=True)
class BlockwiseAdapter(OptimizerAdapter):
    """States that are codes into a table, or plain float32 where the parameter is small."""

    def read(self, state: State, moment: str) -> Tensor:
        """Decode a moment."""
        codes: Tensor = state[moment]
        if codes.dtype != torch.uint8:
            return codes
        table, scale = self._decoding(state, moment)
        # AdEMAMix stacks two moments in one state, each with blocks of its own.
        values = table[codes.long()].view(scale.shape[0], -1)
        wide = scale.repeat_interleave(_OPTIMIZER_BLOCK, dim=1)[:, : values.shape[1]]
        return (values * wide).view(codes.shape)

    def clear_(self, state: State, moment: str, mask: Tensor) -> None:
        """Set entries to the code of 0; the others keep code and scale, and so their value."""
        codes: Tensor = state[moment]
        is_coded = codes.dtype == torch.uint8
        codes.masked_fill_(mask, self._zero(state, moment) if is_coded else 0)

    def obstacle(self, state: State, moment: str, method: str) -> str | None:
        """Refuse states that are not scaled by blocks of 256, and tables without a 0."""
        del method
        codes: Tensor = state[moment]
        if codes.dtype != torch.uint8:
            return None
        if f"absmax{moment.removeprefix('state')}" not in state:
            return "its 8-bit codes are not scaled by blocks: use block-wise states"
        table, scale = self._decoding(state, moment)
        if scale.shape[1] != -(-codes.numel() // scale.shape[0] // _OPTIMIZER_BLOCK):
            return f"its 8-bit codes are not in blocks of {_OPTIMIZER_BLOCK} (bitsandbytes before 0.45)"
        return None if bool((table == 0).any()) else "its table of values has no 0"

    def _decoding(self, state: State, moment: str) -> tuple[Tensor, Tensor]:
        """Return the table, and the scales as (stacked moments, blocks)."""
        number = moment.removeprefix("state")
        scale: Tensor = state[f"absmax{number}"]
        return state[f"qmap{number}"], scale.view(-1, scale.shape[-1])

    def _zero(self, state: State, moment: str) -> int:
        return int((self._decoding(state, moment)[0] == 0).nonzero()[0])


_AUXILIARY = ("qmap1", "qmap2", "absmax1", "absmax2", "unorm_vec", "gnorm_vec")

register_base_codec("nf4", NF4())
# All of its optimizers, 8-bit, 32-bit and paged, derive from one of these.
register_optimizer_adapter(
    BlockwiseAdapter(
        optimizer=bnb.Optimizer2State, moments=("state1", "state2"), step="step", auxiliary=_AUXILIARY
    )
)
register_optimizer_adapter(
    BlockwiseAdapter(optimizer=bnb.Optimizer1State, moments=("state1",), step="step", auxiliary=_AUXILIARY)
)
