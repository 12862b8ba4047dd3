"""What a low-precision base keeps beside it so that merges lose nothing (the merge policy).

A bf16 weight has 8 significant bits: adding a delta of relative size 1e-3 to it loses most of the delta, and
twenty such merges lose most of their sum. The master is the float32 value the merges accumulate in. It is
stored as the weight the forward pass uses plus a *residual*, so that neither can be stale without the other:

- bf16: the float32 master's upper 16 bits, rounded to nearest, are the weight itself; the residual is the
  signed int16 difference of the bit patterns. Two bytes more a weight, and the float32 is exact. (They are
  stored as bytes: DDP broadcasts every buffer, and neither NCCL nor Gloo knows int16.)
- fp16: the residual is the float32 difference, four bytes more.
- fp32, fp64: the weight is its own master; no residual.
- codes of 8 or 4 bits: the residual is the float32 value, four bytes a weight, in host memory.

"native" keeps no residual in any dtype, which is what earlier implementations do.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_BLOCKS = 32


class Master(Protocol):
    """How a weight and its residual spell one high-precision value.

    `read` and `write_` take tensors or equal slices of them, the residual as `elements` gives it.
    """

    def new_residual(self, shape: tuple[int, ...], *, device: torch.device) -> Tensor | None:
        """Return the residual, as stored, of a weight of this shape; 0 says it is exact as it stands."""

    def read(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """Return the master value, at least float32, as a new tensor or the weight itself."""

    def write_(self, weight: Tensor, residual: Tensor | None, value: Tensor) -> None:
        """Store `value`: the nearest weight, and what is left of it in the residual."""


class WeightIsMaster:
    """The weight alone; exact for fp32 and fp64, lossy below ("native")."""

    def new_residual(self, shape: tuple[int, ...], *, device: torch.device) -> Tensor | None:
        """Return None: nothing is kept."""
        del shape, device
        return None

    def read(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """Return the weight in at least float32."""
        del residual
        return weight if weight.dtype == torch.float64 else weight.float()

    def write_(self, weight: Tensor, residual: Tensor | None, value: Tensor) -> None:
        """Round `value` to the weight's dtype."""
        del residual
        weight.copy_(value)


class SplitBFloat16:
    """bf16 weight and int16 residual are the two halves of a float32."""

    def new_residual(self, shape: tuple[int, ...], *, device: torch.device) -> Tensor | None:
        """Return zeros: a bf16 value is a float32 whose lower half is 0."""
        *rows, columns = shape
        return torch.zeros(*rows, 2 * columns, dtype=torch.uint8, device=device)

    def read(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """Put the halves together."""
        assert residual is not None
        upper = weight.view(torch.int16).to(torch.int32) << 16
        return (upper + residual.to(torch.int32)).view(torch.float32)

    def write_(self, weight: Tensor, residual: Tensor | None, value: Tensor) -> None:
        """Split float32 bits. Bit patterns of one sign are ordered like magnitudes, so adding half of the
        lower range rounds to nearest, ties away from zero, and the remainder fits int16.
        """
        assert residual is not None
        bits = value.to(torch.float32).view(torch.int32)
        upper = (bits + 0x8000) >> 16
        weight.view(torch.int16).copy_(upper.to(torch.int16))
        residual.copy_((bits - (upper << 16)).to(torch.int16))


class FloatResidual:
    """fp16 weight and the float32 difference to the master."""

    def new_residual(self, shape: tuple[int, ...], *, device: torch.device) -> Tensor | None:
        """Return zeros."""
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def read(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """Add the difference back."""
        assert residual is not None
        return weight.float() + residual

    def write_(self, weight: Tensor, residual: Tensor | None, value: Tensor) -> None:
        """Round to the weight's dtype and keep the difference."""
        assert residual is not None
        weight.copy_(value)
        residual.copy_(value.float() - weight.float())


class WholeValue:
    """Beside codes the residual is the float32 value itself; they are made from it (`FrozenBase`)."""

    def new_residual(self, shape: tuple[int, ...], *, device: torch.device) -> Tensor | None:
        """Return zeros, to be filled with the value."""
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def read(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """Return the value."""
        del weight
        assert residual is not None
        return residual

    def write_(self, weight: Tensor, residual: Tensor | None, value: Tensor) -> None:
        """Keep the value."""
        del weight
        assert residual is not None
        residual.copy_(value)


def elements(residual: Tensor | None) -> Tensor | None:
    """View a residual as stored with one element for each of its weight's."""
    if residual is None or residual.dtype != torch.uint8:
        return residual
    return residual.view(torch.int16)


_NATIVE = WeightIsMaster()
_FLOAT32_MASTERS: dict[torch.dtype, Master] = {
    torch.float64: _NATIVE,
    torch.float32: _NATIVE,
    torch.bfloat16: SplitBFloat16(),
    torch.float16: FloatResidual(),
}


def master_for(dtype: torch.dtype, *, merge_precision: str, is_coded: bool = False) -> Master:
    """Return how a base of `dtype`, or of codes, keeps its master under ReLoRAConfig.merge_precision."""
    if is_coded:
        return WholeValue()
    return _NATIVE if merge_precision == "native" else _FLOAT32_MASTERS[dtype]


def keeping(
    fn: Callable[[Tensor], Tensor], *, wide: Iterable[Tensor | None], same: Iterable[Tensor | None] = ()
) -> Callable[[Tensor], Tensor]:
    """Return `fn` as `nn.Module._apply` takes it, except that it narrows none of `wide` below float32, and
    gives none of `same` another dtype.
    """
    at_least_float32, as_it_is = {id(tensor) for tensor in wide}, {id(tensor) for tensor in same}

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if id(tensor) in as_it_is:
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        is_narrowed = id(tensor) in at_least_float32 and moved.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(device=moved.device, dtype=torch.float32) if is_narrowed else moved

    return apply


def fingerprint(weight: Tensor) -> Tensor:
    """Return an int64 checksum of the bits of a half-precision or coded weight; a residual belongs only to
    the bits it was split from, and this tells when somebody else has written the weight since.
    """
    bits = weight.detach()
    bits = bits.view(torch.int16) if bits.dtype.is_floating_point else bits
    # In blocks: on a CPU a sum in int64 makes an int64 copy first, four times the weight.
    blocks = bits.split(-(-len(bits) // _BLOCKS))
    rows = torch.cat([block.sum(1, dtype=torch.int64) for block in blocks])
    columns = torch.stack([block.sum(0, dtype=torch.int64) for block in blocks]).sum(0)
    ramps = [torch.arange(1, len(sums) + 1, device=sums.device) for sums in (rows, columns)]
    return (rows * ramps[0]).sum() * 31 + (columns * ramps[1]).sum()
