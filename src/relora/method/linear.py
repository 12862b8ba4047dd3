"""LoRALinear: a frozen base with two small trainable factors beside it (paper section 2, equations 1 and 2).

    y = x W^T + bias + scaling * (x lora_A^T) lora_B^T

The layer it wraps becomes a LoRALinear in place: same object, same `weight` and `bias` Parameters under the
same names, same hooks, with `lora_A` and `lora_B` added. Whoever holds a reference, a checkpoint of the plain
model included, still finds what it knew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.casts import InputCasts, compute_dtype
from relora.method.codecs import BaseCodec
from relora.method.config import ReLoRAConfig
from relora.method.factor_init import FACTOR_INITS, Draw
from relora.method.flops import least_tokens
from relora.method.forward import Rows, effective_linear, frozen_linear, plain_linear
from relora.method.master import keeping
from relora.method.momentum import BaseWithMomentum
from relora.method.observe import Observer, observed, product_of
from relora.method.scaling import initial_scaling
from relora.method.shards import local, whole, write_whole_

_LEAST_GATHERED = 16
"""Tokens from which on finding the inputs that lora_A selects costs less than a product with it."""

_FACTORS = ("lora_A", "lora_B", "lora_scaling")
_OWN_ATTRIBUTES = {
    *("config", "name", "is_transposed", "fixed_scaling", "observers"),
    *("_plain_type", "_plain_trains", "_plain_attributes", "_plain_dtype", "_pending_draw"),
    *("_codec", "_host_residual", "_residual_owner", "_casts", "weight_momentum"),
}


class LoRALinear(BaseWithMomentum):
    """A linear layer (or a `Conv1D`, whose weight is stored transposed) with low-rank factors.

    Shapes: weight (out_features, in_features), or (in_features, out_features) where `is_transposed`;
    lora_A (rank, in_features); lora_B (out_features, rank). The factors of a half-precision base are float32,
    and stay so when the model is cast.
    """

    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: nn.Parameter | None

    fixed_scaling: float
    observers: Sequence[Observer]
    """Told of the base's gradient in each backward pass; ReLoRA sets them for the step to come."""
    _plain_type: type[nn.Module]
    _plain_trains: bool
    _plain_attributes: dict[str, Any]
    _pending_draw: tuple[int, int] | None
    _casts: InputCasts

    @classmethod
    def wrap_(
        cls, layer: nn.Module, config: ReLoRAConfig, *, name: str, seed: int, casts: InputCasts
    ) -> Self:
        """Turn a plain linear layer into a LoRALinear in place; `inject` has checked that it can be one.

        Args:
            layer: An `nn.Linear` or a `Conv1D`.
            config: Rank, scaling, init and precision of the factors.
            name: The layer's full name; with `seed` it determines the first lora_A.
            seed: Root of every factor's seed.
            casts: One for all layers of the model.
        """
        is_transposed = not isinstance(layer, nn.Linear)
        plain_type, plain_attributes = type(layer), dict(vars(layer))
        layer.__class__ = cls
        wrapped = cast(Self, layer)
        wrapped.config, wrapped.name, wrapped.is_transposed = config, name, is_transposed
        wrapped._casts, wrapped.observers = casts, ()
        wrapped._plain_type, wrapped._plain_trains = plain_type, wrapped.weight.requires_grad
        wrapped._plain_attributes = {k: plain_attributes[k] for k in _OWN_ATTRIBUTES & set(plain_attributes)}
        wrapped._add_factors(seed)
        wrapped._adopt_base_()
        return wrapped

    def _add_factors(self, seed: int) -> None:
        weight, rank = self.weight, self.config.rank
        out_features, in_features = weight.shape[::-1] if self.is_transposed else weight.shape
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.fixed_scaling = initial_scaling(self.config, in_features=in_features)
        self.lora_A = nn.Parameter(
            torch.empty(rank, in_features, dtype=dtype, device=weight.device),
            requires_grad=self.config.factors == "both",
        )
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=dtype, device=weight.device))
        self.register_parameter("lora_scaling", None)
        if self.config.scaling_rule == "learned":
            value = torch.tensor(self.fixed_scaling, dtype=dtype, device=weight.device)
            self.lora_scaling = nn.Parameter(value)
        self._add_momentum_()
        self.reinit_(seed=seed, restart_index=0)

    def unwrap_(self) -> nn.Module:
        """Give the plain layer back, in place, without the factors; `fold` has merged them before."""
        self._release_base_()
        plain_type, trains, attributes = self._plain_type, self._plain_trains, self._plain_attributes
        for name in (*_FACTORS, "weight_residual", "weight_scale", *_OWN_ATTRIBUTES):
            delattr(self, name)
        vars(self).update(attributes)
        self.weight.requires_grad_(trains)
        self.__class__ = plain_type  # type: ignore[assignment]
        return self

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Width of the input."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Width of the output."""
        return self.lora_B.shape[0]

    @property
    def scaling(self) -> float | Tensor:
        """The factor of lora_B @ lora_A in the delta: a number, or the learned scalar."""
        return self.fixed_scaling if self.lora_scaling is None else self.lora_scaling

    @property
    def selects_inputs(self) -> bool:
        """Whether each row of lora_A selects one input: with init="columns", and lora_A frozen."""
        return self.config.factor_init == "columns" and not self.lora_A.requires_grad

    @property
    def selected(self) -> Tensor | None:
        """Which input each row of lora_A selects, (rank,); None where they do not do that."""
        return self.lora_A.detach().argmax(1) if self.selects_inputs else None

    @property
    def merge_dtype(self) -> torch.dtype:
        """The dtype merges are computed in: float64, which neither autocast nor TF32 can round; float32 on
        devices without it.
        """
        return torch.float32 if self.weight.device.type == "mps" else torch.float64

    def forward(self, input: Tensor) -> Tensor:
        """Apply base and factors.

        Args:
            input: (..., in_features), in the dtype the plain layer would take.

        Returns:
            (..., out_features). Right after injection or a restart it is the base's output, bit for bit.
        """
        if self._uses_effective_weight(input):
            factors = (self.lora_A, self.lora_B, self.scaling)
            seen = None if self.lora_A.requires_grad else product_of(self.observers)
            output = effective_linear(
                input,
                self.bias,
                *factors,
                *self.base_parts,
                **self._layout,
                casts=self._casts,
                seen=seen,
                selected=self.selected,
            )
            return observed(output, input, self.observers, seen)
        # With lora_A frozen autograd keeps only what is rank wide of the input.
        low = F.dropout(input, self.config.dropout, self.training) if self.config.dropout else input
        low = self._rows(input).of(low) * self.scaling
        output = self._base(input) + F.linear(low, self.lora_B.to(input.dtype))
        return observed(output, input, self.observers)

    def _uses_effective_weight(self, input: Tensor) -> bool:
        """Choose between the forward paths. Dropout, a base that somebody has unfrozen and nested tensors
        know the factored one only.
        """
        if self.weight.requires_grad or (self.config.dropout and self.training) or input.is_nested:
            return False
        if self.config.forward != "auto":
            return self.config.forward == "effective"
        least = least_tokens(
            out_features=self.out_features,
            in_features=self.in_features,
            one_sided=self.config.factors == "B",
        )
        return math.prod(input.shape[:-1]) >= least

    def _rows(self, input: Tensor) -> Rows:
        """Return lora_A for the factored path: with few tokens a product is cheaper than finding what it
        selects, and of a nested tensor nothing can be selected.
        """
        if not self.selects_inputs or input.is_nested or math.prod(input.shape[:-1]) < _LEAST_GATHERED:
            return Rows(self.lora_A)
        return Rows(self.lora_A, self.selected)

    def _base(self, x: Tensor) -> Tensor:
        is_stored_as_used = self._codec is None and self.weight.dtype == compute_dtype(x)
        if is_stored_as_used or self.weight.requires_grad or x.is_nested:
            return plain_linear(x, self.weight, self.bias, self.is_transposed)
        return frozen_linear(x, self.bias, *self.base_parts, **self._layout)

    @property
    def _layout(self) -> "_Layout":
        # Codes are by output feature, whichever way the plain weight lies.
        return {"decoder": self._codec, "is_transposed": self.is_transposed and self._codec is None}

    @torch.no_grad()
    def delta(self, rows: slice = slice(None), *, lora_A: Tensor | None = None) -> Tensor:
        """Return scaling * lora_B @ lora_A, the update of this cycle so far.

        Args:
            rows: Which output features to compute, of those that are here (`num_rows`).
            lora_A: `whole_lora_A()`, from whoever asks for one block of rows after the other.

        Returns:
            (num_rows, in_features), or the rows asked for, in `merge_dtype`.
        """
        dtype = self.merge_dtype
        with torch.autocast(self.weight.device.type, enabled=False):
            scaling = self.scaling.to(dtype) if isinstance(self.scaling, Tensor) else self.scaling
            return (local(self.lora_B)[rows].to(dtype) * scaling) @ (
                self.whole_lora_A() if lora_A is None else lora_A
            )

    def whole_lora_A(self) -> Tensor:
        """Return lora_A in `merge_dtype`, gathered from all ranks if the layer is sharded."""
        return whole(self.lora_A.detach()).to(self.merge_dtype)

    @torch.no_grad()
    def reinit_(self, *, seed: int, restart_index: int) -> None:
        """Start new factors: lora_A drawn from (seed, restart_index, name), lora_B zero."""
        self._pending_draw = (seed, restart_index) if self.lora_A.is_meta else None
        if not self.lora_A.is_meta:
            draw = Draw(
                rank=self.config.rank,
                in_features=self.in_features,
                seed=seed,
                restart_index=restart_index,
                name=self.name,
                device=self.lora_A.device,
            )
            drawn = FACTOR_INITS[self.config.factor_init].draw(draw).to(self.lora_A.device)
            write_whole_(self.lora_A, drawn)
        self.lora_B.zero_()

    @torch.no_grad()
    def _draw_pending_(self) -> None:
        """Draw the factors of a layer injected on the meta device, once there is memory for them."""
        if self._pending_draw is None or self.lora_A.is_meta:
            return
        if self.lora_scaling is not None:
            self.lora_scaling.fill_(self.fixed_scaling)
        seed, restart_index = self._pending_draw
        self.reinit_(seed=seed, restart_index=restart_index)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(dtype)` must not narrow the factors; those from the meta device have yet to be drawn.
        factors = [p for name in _FACTORS if (p := getattr(self, name)) is not None]
        super()._apply(keeping(fn, wide=(*factors, *(p.grad for p in factors))), recurse)
        self._draw_pending_()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        entries = cast(dict[str, Any], state_dict)
        own = {name: p for name in _FACTORS if (p := getattr(self, name)) is not None}
        weight = entries.get(prefix + "weight")
        # For what a checkpoint lacks, torch.distributed.checkpoint puts the model's own parameters there.
        given = [name for name, p in own.items() if entries.get(prefix + name, p) is not p]
        if "lora_A" in given:
            self._pending_draw = None
            if not self.could_be_rows(entries[prefix + "lora_A"]):
                args[-1].append(
                    f'{prefix}lora_A is of another init: with init="columns" each row selects one input (a '
                    "single 1); inject the model with the init it was saved with"
                )
                entries[prefix + "lora_A"] = self.lora_A.detach().clone()
        elif weight is not None and weight is not self.weight and not given:
            # A checkpoint of the plain model: its function is the base alone, so the delta becomes 0.
            for name, p in own.items():
                value = torch.empty_like(p, device=weight.device) if p.is_meta else p.detach().clone()
                entries[prefix + name] = value
            entries[prefix + "lora_B"].zero_()
            if self.weight_momentum is not None:
                entries[prefix + "weight_momentum"] = torch.zeros_like(
                    self.weight_momentum, device=weight.device
                )
        super()._load_from_state_dict(entries, prefix, *args, **kwargs)
        self._draw_pending_()

    def could_be_rows(self, rows: object) -> bool:
        """Tell whether something is fit to be this layer's lora_A; what is no plain tensor is not judged."""
        if not self.selects_inputs or not isinstance(rows, Tensor):
            return True
        if rows.is_meta or rows.shape != self.lora_A.shape:
            return True
        rows = whole(rows.detach())
        if type(rows) is not Tensor:
            return True
        return bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all())

    def extra_repr(self) -> str:
        """Show the shape, rank and scaling in `print(model)`."""
        scaling = "learned" if self.lora_scaling is not None else f"{self.fixed_scaling:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.config.rank}, scaling={scaling}, "
            f"factors={self.config.factors!r}"
        )


class _Layout(TypedDict):
    decoder: BaseCodec | None
    is_transposed: bool


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """Return the injected layers of a model in the order of its modules.

    Raises:
        ConfigError: if there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} holds no LoRALinear layer: call inject(model, config) first"
        )
    return layers
