"""In which dtype matrix products run: fp32, or bf16 autocast over fp32 weights; there is no fp16.

"auto" asks the hardware. GPUs say whether they have bf16; CPUs that lack it emulate it, several times slower
than fp32, so there the two are raced.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch

from relora.train.sections import Precision

Resolved = Literal["fp32", "bf16"]

# Emulated bf16 shows in a small product already, and takes seconds for large ones.
_HEAT_SIZE, _RACE_SIZE = 128, 512
_HOPELESS = 0.25
_RACE_ROUNDS = 7
# Autocast converts weights and activations; bf16 products must win clearly for a step to win at all.
_WORTHWHILE = 1.3


def resolve_precision(precision: Precision, device: torch.device) -> tuple[Resolved, str]:
    """Return the precision to train in, and why, in words."""
    if precision != "auto":
        return precision, "as the recipe says"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
        return ("bf16", f"{name} has it") if has_bf16 else ("fp32", f"{name} has no bf16")
    ratio = _bf16_speed(_HEAT_SIZE)
    if ratio >= _HOPELESS:
        ratio = _bf16_speed(_RACE_SIZE)
    reason = f"bf16 products measured {ratio:.1f}x as fast as fp32 on this CPU"
    return ("bf16" if ratio >= _WORTHWHILE else "fp32"), reason


def autocast(precision: Resolved, device: torch.device) -> AbstractContextManager[None]:
    """Return the context for forward passes."""
    if precision == "fp32":
        return nullcontext()
    return cast(AbstractContextManager[None], torch.autocast(device.type, dtype=torch.bfloat16))


def _bf16_speed(size: int) -> float:
    """Return the speed of bf16 products of a size over that of fp32 ones."""
    return _product_s(size, torch.float32) / _product_s(size, torch.bfloat16)


def _product_s(size: int, dtype: torch.dtype) -> float:
    """Return the least time of a matrix product; the least is what noise from other programs spares."""
    left = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(_RACE_ROUNDS):
        begun = time.perf_counter()
        torch.mm(left, left)
        times.append(time.perf_counter() - begun)
    return min(times)
