"""Cross-entropy of an output head, a chunk of tokens at a time: (tokens, V) logits never exist whole.

    loss = mean over n of  logsumexp(h_n W^T + b) - (h_n W^T + b)[target_n]

Gradients are formed while a chunk's logits are at hand: with p the softmax and e the one-hot target,

    dh_n = (p_n - e_n) W,    dW = sum_n (p_n - e_n)^T h_n,    db = sum_n (p_n - e_n)

so nothing is computed twice; what waits for the backward pass is dh and dW, as large as h and W. It is exact,
and faster than whole logits, which pass through memory several times in float32.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# On the CPU a chunk's logits should stay in the cache; a GPU wants large products (2^25 logits: 128 MiB).
_CPU_TOKENS = 256
_GPU_LOGITS = 1 << 25


def auto_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return how many tokens a chunk holds where the recipe does not say."""
    return _CPU_TOKENS if device.type == "cpu" else max(_CPU_TOKENS, _GPU_LOGITS // vocab_size)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk_tokens: int
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T + bias` against `targets`.

    Products run in autocast's dtype where it is on; softmax, sums and the weight's gradient in at least
    float32. The backward pass can be taken once.

    Args:
        hidden: (N, D), the final hidden states.
        weight: (V, D), the output head's.
        bias: (V,), or None.
        targets: (N,) token ids.
        chunk_tokens: Rows whose logits exist at one time.

    Returns:
        0-d, in at least float32.
    """
    device = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_autocast else weight.dtype
    arguments = (hidden, weight, bias, targets, chunk_tokens, dtype, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _ChunkedCrossEntropy.apply(*arguments))  # type: ignore[no-untyped-call]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        needs_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        wants = [needs_gradients and needed for needed in ctx.needs_input_grad[:3]]
        head, head_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        d_hidden = torch.empty_like(hidden, dtype=dtype) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants[2] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for first in range(0, len(targets), chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            states, target = hidden[rows].to(dtype), targets[rows].unsqueeze(1)
            log_p = torch.log_softmax(torch.nn.functional.linear(states, head, head_bias), -1, dtype=wide)
            total -= log_p.gather(1, target).sum()
            if not any(wants):
                continue
            difference = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            if d_bias is not None:
                d_bias += difference.sum(0)
            difference = difference.to(dtype)
            if d_hidden is not None:
                d_hidden[rows] = difference @ head
            if d_weight is not None and d_weight.dtype == dtype:
                d_weight.addmm_(difference.T, states)
            elif d_weight is not None:
                d_weight += difference.T @ states
        # Not save_for_backward: what is saved there is shared, and a gradient that is shared gets copied.
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.num_tokens = len(targets)
        return total / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy: its backward pass can be taken once only")
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0] / ctx.num_tokens
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)
