"""Low-rank layers once more, in plain numpy float64, from the paper's formulas; shares no code with src.

Source: ReLoRA (arXiv 2307.05695) equations 1 and 2, LoRA (arXiv 2106.09685) section 4.1, Kaiming-uniform as
`torch.nn.init.kaiming_uniform_(a=sqrt(5))` documents it, Adam's first step from its definition.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(lora_a: Array, lora_b: Array, scaling: float) -> Array:
    """Return the change of the weight: scaling * B A, as a sum over the rank."""
    return scaling * sum(
        (np.outer(lora_b[:, k], lora_a[k]) for k in range(len(lora_a))),
        start=np.zeros((len(lora_b), lora_a.shape[1])),
    )


def forward(
    x: Array, weight: Array, bias: Array | None, lora_a: Array, lora_b: Array, scaling: float
) -> Array:
    """Apply a layer whose weight is (out, in): one matrix, base plus delta."""
    out = np.einsum("...i,oi->...o", x, weight + delta(lora_a, lora_b, scaling))
    return out if bias is None else out + bias


def gradients(
    x: Array, grad: Array, weight: Array, lora_a: Array, lora_b: Array, scaling: float
) -> dict[str, Array]:
    """Return the gradients of sum(grad * forward(x)), each from the gradient of the whole weight."""
    whole = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return {
        "input": np.einsum("...o,oi->...i", grad, weight + delta(lora_a, lora_b, scaling)),
        "bias": grad.reshape(-1, grad.shape[-1]).sum(0),
        "lora_A": scaling * np.einsum("oi,or->ri", whole, lora_b),
        "lora_B": scaling * np.einsum("oi,ri->or", whole, lora_a),
        "lora_scaling": np.einsum("oi,oi->", whole, delta(lora_a, lora_b, 1.0)),
    }


def kaiming_bound(in_features: int) -> float:
    """Return Kaiming-uniform's bound: gain * sqrt(3 / fan_in), gain = sqrt(2 / (1 + a^2)), a^2 = 5."""
    return math.sqrt(2 / (1 + 5)) * math.sqrt(3 / in_features)


def adam_first_step(gradient: Array, lr: float, eps: float = 1e-8) -> Array:
    """Return Adam's first update: with both moments bias-corrected it is -lr * g / (|g| + eps)."""
    return -lr * gradient / (np.abs(gradient) + eps)


def rms(values: Array) -> float:
    """Return the root mean square of all entries."""
    return float(np.sqrt(np.mean(np.square(values))))


def numerical_rank(matrix: Array, relative: float) -> int:
    """Count singular values above `relative` times the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > relative * values[0]).sum()) if values[0] else 0


def nearest_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round float32 to bfloat16 and back, nearest with ties to even, on the bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (rounded << 16).astype(np.uint32).view(np.float32)


def merge_in_bfloat16(weight: NDArray[np.float32], update: Array) -> NDArray[np.float32]:
    """Add an update to a weight that is stored in bfloat16 and nothing beside it."""
    return nearest_bfloat16((weight.astype(np.float64) + update).astype(np.float32))
