"""The base's master: what a half-precision weight and its residual keep of a float32 value."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from reference.low_rank import nearest_bfloat16
from relora.method.master import (
    FloatResidual,
    SplitBFloat16,
    WeightIsMaster,
    elements,
    fingerprint,
    keeping,
    master_for,
)

HALVES = (torch.bfloat16, torch.float16)
# Magnitudes as bits, subnormals included, up to where rounding to nearest reaches infinity in bfloat16.
MAGNITUDES = st.integers(min_value=0, max_value=0x7F7F7FFF)


def stored(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Write float32 values into a new weight of `dtype`; return weight, residual, and what reads back."""
    master = master_for(dtype, merge_precision="float32")
    weight = torch.zeros(value.shape, dtype=dtype)
    residual = master.new_residual(weight.shape, device=weight.device)
    master.write_(weight, elements(residual), value)
    return weight, residual, master.read(weight, elements(residual))


@given(st.lists(MAGNITUDES, min_size=1, max_size=20))
@example([0x0, 0x8000, 0x7FFF, 0x3F808000, 0x3F807FFF, 0x3F818000, 0x1, 0xFFFF, 0x7F7F7FFF])
def test_bfloat16_and_residual_hold_every_float32_exactly(bits: list[int]) -> None:
    magnitude = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    value = torch.cat([magnitude, -magnitude])
    weight, residual, read = stored(value, torch.bfloat16)
    assert residual is not None and residual.nbytes == weight.nbytes
    assert torch.equal(read.view(torch.int32), value.view(torch.int32))
    # The weight the forward pass sees is a nearest one; only ties may differ from torch's choice.
    exact = value.double()
    assert torch.equal((weight.double() - exact).abs(), (value.bfloat16().double() - exact).abs())


def test_the_reference_rounding_is_torchs() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(nearest_bfloat16(value.numpy()), value.bfloat16().float().numpy())


def test_float16_and_residual_hold_a_value_to_float32_rounding() -> None:
    value = torch.randn(500, generator=torch.Generator().manual_seed(0))
    weight, residual, read = stored(value, torch.float16)
    assert residual is not None and residual.dtype == torch.float32
    assert torch.equal(weight, value.half())
    # The residual is exact (Sterbenz), so the sum is what was written.
    assert torch.equal(read, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_weight_is_its_own_master(dtype: torch.dtype) -> None:
    master = master_for(dtype, merge_precision="float32")
    weight = torch.randn(3, 5, dtype=dtype)
    assert master.new_residual(weight.shape, device=weight.device) is None
    assert master.read(weight, None).dtype == dtype
    master.write_(weight, None, torch.full((3, 5), 1 / 3, dtype=torch.float64))
    assert torch.equal(weight, torch.full((3, 5), 1 / 3, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_native_keeps_nothing_beside_the_weight(dtype: torch.dtype) -> None:
    master = master_for(dtype, merge_precision="native")
    weight = torch.zeros(4, dtype=dtype)
    assert (
        isinstance(master, WeightIsMaster) and master.new_residual(weight.shape, device=weight.device) is None
    )
    master.write_(weight, None, torch.full((4,), 1 / 3))
    assert torch.equal(master.read(weight, None), torch.full((4,), 1 / 3).to(dtype).float())


@pytest.mark.parametrize("dtype", HALVES)
def test_transposed_weights_are_split_like_others(dtype: torch.dtype) -> None:
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    master = master_for(dtype, merge_precision="float32")
    weight = torch.zeros(4, 6, dtype=dtype)
    residual = elements(master.new_residual(weight.shape, device=weight.device))
    assert residual is not None
    master.write_(weight.T, residual.T, value)
    assert torch.equal(master.read(weight, residual), value.T)
    assert torch.equal(master.read(weight.T[2:5], residual.T[2:5]), value[2:5])


@pytest.mark.parametrize(("master", "dtype"), [(SplitBFloat16(), HALVES[0]), (FloatResidual(), HALVES[1])])
def test_a_new_residual_leaves_the_weight_as_it_reads(
    master: SplitBFloat16 | FloatResidual, dtype: torch.dtype
) -> None:
    weight = torch.randn(50).to(dtype)
    assert torch.equal(
        master.read(weight, elements(master.new_residual(weight.shape, device=weight.device))), weight.float()
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_the_fingerprint_tells_a_weight_from_one_that_was_written_since(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(fingerprint(weight))
    assert int(fingerprint(weight.clone())) == before
    row_swapped, column_swapped = weight[[1, 0, 2, 3, 4]], weight[:, [1, 0, 2, 3, 4, 5, 6]]
    nudged = weight.clone()
    nudged.view(torch.int16)[3, 4] += 1
    changed = [row_swapped, column_swapped, nudged, -weight, weight * 2, torch.zeros_like(weight), weight + 1]
    assert before not in [int(fingerprint(other)) for other in changed]


def test_the_fingerprint_does_not_depend_on_layout() -> None:
    weight = torch.randn(5, 7).bfloat16()
    assert torch.equal(fingerprint(weight.T.contiguous().T), fingerprint(weight))


def test_a_cast_can_be_kept_from_narrowing_chosen_tensors() -> None:
    kept, other = torch.rand(3), torch.rand(3)
    cast = keeping(lambda tensor: tensor.half(), wide=[kept, None])
    assert torch.equal(cast(kept), kept) and cast(other).dtype == torch.float16
    widen = keeping(lambda tensor: tensor.double(), wide=[kept])
    assert widen(kept).dtype == torch.float64
