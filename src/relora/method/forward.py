"""The two ways to apply a low-rank layer.

    factored:   y = x W^T + bias + (x A^T) (s B)^T
    effective:  y = x (W + s B A)^T + bias

Which of them costs less is module `flops`. The effective weight is formed twice, in the forward and again in
the backward, rather than kept between them: kept, it would be one more copy of the model, held by every
layer at once, while forming costs r / T of one of the layer's products. So the backward has the layer's input
alone, and with lora_A frozen only x A^T, which is rank wide.

What is rounded where: the sum W + s B A is rounded once, to the dtype of the products. With a float32 base
under bfloat16 autocast that is what full-rank training does to its float32 weight. A base stored in bfloat16
has no lower bits, so there an entry of the delta shows once it exceeds half a step of its weight's entry.
"""

from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from relora.method.casts import InputCasts, compute_dtype
from relora.method.observe import SeenProduct


class Rows(NamedTuple):
    """lora_A, (rank, in_features), and which input each of its rows selects, (rank,), where they do that."""

    lora_A: Tensor
    selected: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return x lora_A^T, (..., rank), in the dtype of x (..., in_features)."""
        if self.selected is not None:
            return x.index_select(-1, self.selected)
        return F.linear(x, self.lora_A.to(x.dtype))

    def beside(self, x: Tensor, product: Tensor) -> Tensor:
        """Return what x (N, in_features) holds outside orthonormal rows, with `product` = x lora_A^T."""
        if self.selected is not None:
            return x.index_fill(1, self.selected, 0)
        return x - product @ self.lora_A


class Decoder(Protocol):
    """What turns the stored parts of a base into its values."""

    def decode(self, stored: Tensor, scale: Tensor, *, columns: int, dtype: torch.dtype) -> Tensor:
        """Return (rows, columns) values of the rows stored, in `dtype`."""


def effective_linear(
    input: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    *base: Tensor,
    decoder: Decoder | None = None,
    is_transposed: bool = False,
    casts: InputCasts | None = None,
    seen: SeenProduct | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Return x (W + s B A)^T + bias; differentiable in all but the base.

    Args:
        input: (..., in_features).
        bias: (out_features,), or None.
        lora_A: (rank, in_features).
        lora_B: (out_features, rank).
        scaling: s, a number or a 0-d tensor.
        *base: The weight, or its stored parts, which `decoder` turns into (out_features, in_features).
        decoder: None where the base is the weight itself.
        is_transposed: Whether the weight is (in_features, out_features).
        casts: Shared by layers that may be given the same input.
        seen: Where g^T x lora_A^T will be found in the backward, made by an observer that keeps `input` too.
        selected: (rank,) which input each row of a frozen lora_A selects, or None where it is any other.
    """
    dtype = compute_dtype(input)
    # A cast input goes in beside the input: the function keeps the one and gives its gradient to the other.
    cast_input = None if input.dtype == dtype else (casts or InputCasts())(input, dtype)
    keeps_low = torch.is_grad_enabled() and not lora_A.requires_grad and seen is None
    how = (decoder, is_transposed, keeps_low, seen)
    args = (input, cast_input, bias, lora_A, lora_B, scaling, selected, *how, *base)
    return cast(Tensor, EffectiveLinear.apply(*args)[0])  # type: ignore[no-untyped-call]


def frozen_linear(
    input: Tensor,
    bias: Tensor | None,
    *base: Tensor,
    decoder: Decoder | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """Return x W^T + bias; differentiable in all but the base, which is decoded or cast again in the backward
    instead of being kept as a copy.
    """
    x = input.to(compute_dtype(input))
    return cast(Tensor, FrozenLinear.apply(x, bias, decoder, is_transposed, *base))  # type: ignore[no-untyped-call]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """Call what the plain layer would, so that equal weights give equal bits."""
    if not is_transposed:
        return F.linear(x, weight, bias)
    assert bias is not None
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])


class EffectiveLinear(torch.autograd.Function):
    """y = x (W + s B A)^T + bias, and the gradients of the factors by rank-wide products.

    Returns y and, where lora_A needs no gradient, x A^T, which is then all the backward keeps of the input.
    Every formula is itself differentiable.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: PLR0917
        input: Tensor,
        cast_input: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: Tensor | float,
        selected: Tensor | None,
        decoder: Decoder | None,
        is_transposed: bool,
        keeps_low: bool,
        seen: SeenProduct | None,
        *base: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Form the weight and apply it."""
        del seen
        x = input if cast_input is None else cast_input
        B = _scaled(lora_B, scaling, x.dtype)
        rows = Rows(lora_A, selected)
        weight = _formed(base, decoder, is_transposed, rows, B)
        low = rows.of(x) if keeps_low else None
        return plain_linear(x, weight, _as(bias, x), is_transposed), low

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """Keep the input, or x A^T instead; everything else here is a parameter that exists anyway. Beside an
        observer it is the input as given, which the observer keeps too.
        """
        input, cast_input, bias, lora_A, lora_B, scaling, selected, *rest = inputs
        ctx.decoder, ctx.is_transposed, ctx.one_sided, ctx.seen, *base = rest
        x = input if cast_input is None else cast_input
        ctx.set_materialize_grads(False)
        ctx.number = None if isinstance(scaling, Tensor) else scaling
        ctx.bias_dtype, ctx.dtype = None if bias is None else bias.dtype, x.dtype
        ctx.input_dtype = input.dtype
        kept = output[1] if ctx.one_sided else x if ctx.seen is None else input
        scalar = scaling if ctx.number is None else None
        ctx.save_for_backward(kept, lora_A, lora_B, scalar, selected, *base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, bias, factors and scaling."""
        grad, grad_low = grads
        kept, lora_A, lora_B, scalar, selected, *base = ctx.saved_tensors
        wants_input, _, wants_bias, wants_A, wants_B, wants_scaling, *_ = ctx.needs_input_grad
        scaling = ctx.number if scalar is None else scalar
        rows, B = Rows(lora_A, selected), _scaled(lora_B, scaling, ctx.dtype)
        d_input = d_bias = d_A = d_B = d_scaling = None
        if grad is not None:
            g = grad.reshape(-1, grad.shape[-1])
            if wants_B or wants_scaling or wants_A:
                # What was seen has no derivative of its own.
                d_product = None if ctx.seen is None or torch.is_grad_enabled() else ctx.seen.take()
                if d_product is None:
                    flat = kept.reshape(-1, kept.shape[-1]).to(ctx.dtype)
                    d_A, d_product = _factor_gradients(
                        g, flat, rows, B, one_sided=ctx.one_sided, wants_A=wants_A
                    )
                d_B = (d_product * scaling).to(lora_B.dtype)
                d_scaling = (d_product.to(lora_B.dtype) * lora_B).sum() if wants_scaling else None
                d_A = None if d_A is None else d_A.to(lora_A.dtype)
            if wants_bias:
                d_bias = g.sum(0, dtype=ctx.bias_dtype)
            if wants_input:
                weight = _formed(base, ctx.decoder, ctx.is_transposed, rows, B)
                d_input = grad @ (weight.T if ctx.is_transposed else weight)
        if grad_low is not None and wants_input:  # only in a second derivative
            through_low = grad_low @ lora_A.to(ctx.dtype)
            d_input = through_low if d_input is None else d_input + through_low
        d_input = None if d_input is None else d_input.to(ctx.input_dtype)
        return d_input, None, d_bias, d_A, d_B, d_scaling, *(None,) * (5 + len(base))


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + bias for a base that is decoded or cast to be used, in the forward and in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, decoder: Decoder | None, is_transposed: bool, *base: Tensor
    ) -> Tensor:
        """Apply the base."""
        return plain_linear(x, _values(base, decoder, x), _as(bias, x), is_transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the base as it is stored."""
        del output
        x, bias, ctx.decoder, ctx.is_transposed, *base = inputs
        ctx.bias_dtype, ctx.in_features = None if bias is None else bias.dtype, x.shape[-1]
        ctx.save_for_backward(*base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias."""
        grad, base = grads[0], ctx.saved_tensors
        d_input = d_bias = None
        if ctx.needs_input_grad[1]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            weight = _values(base, ctx.decoder, grad, columns=ctx.in_features)
            d_input = grad @ (weight.T if ctx.is_transposed else weight)
        return d_input, d_bias, *(None,) * (2 + len(base))


def _factor_gradients(
    g: Tensor, kept: Tensor, rows: Rows, B: Tensor, *, one_sided: bool, wants_A: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of lora_A and of s * lora_B; g (T, m), kept (T, n) or x A^T (T, r)."""
    if one_sided:
        return None, g.T @ kept
    if rows.selected is not None:  # where an observer keeps the input, but left nothing
        return None, g.T @ rows.of(kept)
    A = rows.lora_A.to(kept.dtype)
    tokens, (m, r), n = g.shape[0], B.shape, A.shape[1]
    # From r = d/4 on the whole gradient of W is the cheaper way to both, at one weight's size of memory.
    if 2 * tokens * m * n + 4 * m * n * r < 4 * tokens * r * (m + n):
        d_weight = g.T @ kept
        return B.T @ d_weight if wants_A else None, d_weight @ A.T
    return (g @ B).T @ kept if wants_A else None, g.T @ (kept @ A.T)


def _formed(
    base: tuple[Tensor, ...] | list[Tensor],
    decoder: Decoder | None,
    is_transposed: bool,
    rows: Rows,
    B: Tensor,
) -> Tensor:
    """Return W + B A in B's dtype, laid out as W is; one product where W has that dtype too."""
    weight = base[0] if decoder is None else _values(base, decoder, B, columns=rows.lora_A.shape[1])
    if rows.selected is not None:
        exact = weight.to(torch.promote_types(weight.dtype, B.dtype))
        dim, columns = (0, B.T) if is_transposed else (1, B)
        return exact.index_add(dim, rows.selected, columns.to(exact.dtype)).to(B.dtype)
    A = rows.lora_A.to(B.dtype)
    left, right = (A.T, B.T) if is_transposed else (B, A)
    if weight.dtype == A.dtype:
        return torch.addmm(weight, left, right)
    # In the wider of the two dtypes, rounded once.
    wide = torch.promote_types(weight.dtype, A.dtype)
    return (left @ right).to(wide).add_(weight).to(A.dtype)


def _values(
    base: tuple[Tensor, ...] | list[Tensor], decoder: Decoder | None, like: Tensor, columns: int | None = None
) -> Tensor:
    if decoder is None:
        return base[0].to(like.dtype)
    stored, scale = base
    return decoder.decode(stored, scale, columns=columns or like.shape[-1], dtype=like.dtype)


def _scaled(lora_B: Tensor, scaling: Tensor | float, dtype: torch.dtype) -> Tensor:
    is_one = not isinstance(scaling, Tensor) and scaling == 1
    return (lora_B if is_one else lora_B * scaling).to(dtype)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
