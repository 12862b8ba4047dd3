"""Look at a frozen base's gradient while the backward pass goes by.

The base W of a LoRALinear has no `.grad`, but its gradient is there for the taking: with input x (N, in) and
gradient g (N, out) of the layer's output, it is

    G = g^T x,    (out, in)

`observed` passes an output through an autograd node that keeps x until g arrives and hands both to the
layer's observers. What they keep of G is theirs: a sketch (module `gradient_init`), a vote an entry
(`complement`).
A layer without observers pays nothing: no node, nothing saved. With them, x is kept for the backward as in
full-rank training, which a frozen lora_A otherwise spares.

Once for each time the backward passes a layer: under gradient accumulation once a micro batch, under
gradient checkpointing (either kind) once as well.

Eager only. ReLoRA refuses a compiled model in words; where the model is compiled after it, `fullgraph=True`
is refused, and without it torch.compile leaves observed layers to eager mode: right, but not fast.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from relora.errors import ConfigError


class Observer(Protocol):
    """What is told of a layer's inputs and output gradients."""

    forms_product: bool
    """Whether `observe` forms G lora_A^T on its way."""

    def observe(self, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Take note of one backward pass.

        Args:
            x: The layer's input, (N, in_features), in the gradient's dtype.
            gradient: Of the layer's output, (N, out_features).

        Returns:
            G lora_A^T of this pass, (out_features, rank), if `forms_product`.
        """


class SeenProduct:
    """G lora_A^T of one backward pass, left by an observer for the layer's own backward, which comes next and
    then need not go over the tokens again.
    """

    def __init__(self) -> None:
        self._product: Tensor | None = None

    def leave(self, product: Tensor) -> None:
        """Put it down."""
        self._product = product

    def take(self) -> Tensor | None:
        """Pick it up; None if none was left since."""
        product, self._product = self._product, None
        return product


class Observers(tuple[Observer, ...]):
    """A layer's observers. A copy of the layer, by `copy.deepcopy` or from a file, has none."""

    def __reduce__(self) -> tuple[type[tuple[Observer, ...]], tuple[()]]:
        return tuple, ()


def observed(
    output: Tensor, x: Tensor, observers: Sequence[Observer], seen: SeenProduct | None = None
) -> Tensor:
    """Return `output`, whose gradient the observers will be told together with `x`.

    Args:
        output: (..., out_features), computed just now by the layer and held by nobody else.
        x: The layer's input, (..., in_features).
        observers: Usually none.
        seen: Where what they form on the way is left.

    Raises:
        ConfigError: while torch.compile traces, so that it leaves the caller to eager mode.
    """
    _refuse_tracing(observers)
    if not observers or not output.requires_grad:
        return output
    return _untraced()(output, x, observers, seen)


def product_of(observers: Sequence[Observer]) -> SeenProduct | None:
    """Return where one of the observers will leave its product; None if none forms it.

    Raises:
        ConfigError: as `observed`.
    """
    _refuse_tracing(observers)
    return SeenProduct() if any(observer.forms_product for observer in observers) else None


def _refuse_tracing(observers: Sequence[Observer]) -> None:
    if observers and torch.compiler.is_compiling():
        raise ConfigError(
            "init='gradient' and residual observe gradients in eager mode only: do not compile the model "
            "(train.compile), or choose settings that need no gradient of the base"
        )


@functools.cache
def _untraced() -> Callable[[Tensor, Tensor, Sequence[Observer], SeenProduct | None], Tensor]:
    # Made on first use, since making it imports the compiler; where `observed` is left to eager mode, this is
    # too, instead of being traced by itself.
    return torch.compiler.disable(_Observed.apply)  # type: ignore[no-any-return]


class _Observed(torch.autograd.Function):
    """The identity in `output`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, observers: Sequence[Observer], seen: SeenProduct | None
    ) -> Tensor:
        # As saved tensor, not in a closure: checkpointing and offloading then do with it what they do.
        ctx.save_for_backward(x)
        ctx.observers, ctx.seen = observers, seen
        # Returned as it is, it would be a view, which an in-place activation after the layer may not change.
        # A view made inside another node may not be marked; with one, torch refuses that activation anyway.
        if not output._is_view():
            ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            # Where autocast computed the output, its gradient is of the low precision that x was cast to.
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            inputs = x.detach().reshape(-1, x.shape[-1]).to(rows.dtype)
            for observer in ctx.observers:
                product = observer.observe(inputs, rows)
                if product is not None and ctx.seen is not None:
                    ctx.seen.leave(product)
        return gradient, None, None, None


def refuse_compiled(model: nn.Module, setting: str) -> None:
    """Refuse a model whose backward passes the observers would not be told of.

    Args:
        model: The injected model or a wrapper around it.
        setting: What needs the gradients, for the message.

    Raises:
        ConfigError: if the model or a part of it is compiled.
    """
    for name, module in model.named_modules():
        is_compiled = getattr(module, "_compiled_call_impl", None) is not None
        if is_compiled or type(module).__name__ == "OptimizedModule":
            raise ConfigError(
                f"{setting} observes gradients in eager mode only, but {name or 'the model'} is compiled: "
                "do not compile it, or choose settings that need no gradient of the base"
            )
