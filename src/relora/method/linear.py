"""LoRALinear: a frozen base with two small trainable factors beside it (paper section 2, equations 1 and 2).

    y = x W^T + bias + scaling * (x lora_A^T) lora_B^T

The layer it wraps becomes a LoRALinear in place: same object, same `weight` and `bias` Parameters under the
same names, same hooks, with `lora_A` and `lora_B` added. Whoever holds a reference, a checkpoint of the plain
model included, still finds what it knew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.config import ReLoRAConfig
from relora.method.factor_init import FACTOR_INITS, Draw
from relora.method.master import SUPPORTED_DTYPES, Master, elements, fingerprint, keeping_float32, master_for
from relora.method.observe import Observer, observed
from relora.method.scaling import initial_scaling

# Merges work on blocks of rows, so that their float64 intermediates stay small whatever the layer's size.
_BLOCK_ENTRIES = 1 << 22
_FACTORS = ("lora_A", "lora_B", "lora_scaling")
_OWN_ATTRIBUTES = {
    *("config", "name", "is_transposed", "fixed_scaling", "observers"),
    *("_plain_type", "_plain_trains", "_plain_attributes", "_residual_owner", "_pending_draw"),
}


class LoRALinear(nn.Module):
    """A linear layer (or a `Conv1D`, whose weight is stored transposed) with low-rank factors.

    Shapes: weight (out_features, in_features), or (in_features, out_features) where `is_transposed`;
    lora_A (rank, in_features); lora_B (out_features, rank). The factors of a half-precision base are float32,
    and stay so when the model is cast.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: nn.Parameter | None
    weight_residual: Tensor | None

    config: ReLoRAConfig
    name: str
    is_transposed: bool
    fixed_scaling: float
    observers: Sequence[Observer]
    """Told of the base's gradient in each backward pass; ReLoRA sets them for the step to come."""
    _plain_type: type[nn.Module]
    _plain_trains: bool
    _plain_attributes: dict[str, Any]
    _residual_owner: Tensor | None
    _pending_draw: tuple[int, int] | None

    @classmethod
    def wrap_(cls, layer: nn.Module, config: ReLoRAConfig, *, name: str, seed: int) -> Self:
        """Turn a plain linear layer into a LoRALinear in place; `inject` has checked that it can be one.

        Args:
            layer: An `nn.Linear` or a `Conv1D`.
            config: Rank, scaling, init and precision of the factors.
            name: The layer's full name; with `seed` it determines the first lora_A.
            seed: Root of every factor's seed.
        """
        is_transposed = not isinstance(layer, nn.Linear)
        plain_type, plain_attributes = type(layer), dict(vars(layer))
        layer.__class__ = cls
        wrapped = cast(Self, layer)
        wrapped.config, wrapped.name, wrapped.is_transposed = config, name, is_transposed
        wrapped._plain_type, wrapped._plain_trains = plain_type, wrapped.weight.requires_grad
        wrapped._plain_attributes = {k: plain_attributes[k] for k in _OWN_ATTRIBUTES & set(plain_attributes)}
        wrapped.observers = ()
        wrapped.weight.requires_grad_(False).grad = None
        wrapped._add_factors(seed)
        wrapped.register_buffer("weight_residual", None)
        # A buffer too, so that whoever copies or broadcasts weights and buffers keeps the three together.
        wrapped.register_buffer("_residual_owner", None, persistent=False)
        wrapped._fit_residual()
        return wrapped

    def _add_factors(self, seed: int) -> None:
        weight, rank = self.weight, self.config.rank
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.fixed_scaling = initial_scaling(self.config, in_features=self.in_features)
        self.lora_A = nn.Parameter(
            torch.empty(rank, self.in_features, dtype=dtype, device=weight.device),
            requires_grad=self.config.factors == "both",
        )
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=weight.device))
        self.register_parameter("lora_scaling", None)
        if self.config.scaling_rule == "learned":
            value = torch.tensor(self.fixed_scaling, dtype=dtype, device=weight.device)
            self.lora_scaling = nn.Parameter(value)
        self.reinit_(seed=seed, restart_index=0)

    def unwrap_(self) -> nn.Module:
        """Give the plain layer back, in place, without the factors; `fold` has merged them before."""
        plain_type, trains, attributes = self._plain_type, self._plain_trains, self._plain_attributes
        for name in (*_FACTORS, "weight_residual", *_OWN_ATTRIBUTES):
            delattr(self, name)
        vars(self).update(attributes)
        self.weight.requires_grad_(trains)
        self.__class__ = plain_type  # type: ignore[assignment]
        return self

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[0 if self.is_transposed else 1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[1 if self.is_transposed else 0]

    @property
    def scaling(self) -> float | Tensor:
        """The factor of lora_B @ lora_A in the delta: a number, or the learned scalar."""
        return self.fixed_scaling if self.lora_scaling is None else self.lora_scaling

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
        # With lora_A frozen autograd keeps only the rank-wide product of the first F.linear, not the input.
        low = F.dropout(input, self.config.dropout, self.training) if self.config.dropout else input
        low = F.linear(low, self.lora_A.to(input.dtype)) * self.scaling
        output = self._base(input) + F.linear(low, self.lora_B.to(input.dtype))
        return observed(output, input, self.observers)

    def _base(self, x: Tensor) -> Tensor:
        if not self.is_transposed:
            return F.linear(x, self.weight, self.bias)
        assert self.bias is not None
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.out_features)

    @torch.no_grad()
    def delta(self, rows: slice = slice(None)) -> Tensor:
        """Return scaling * lora_B @ lora_A, the update of this cycle so far.

        Args:
            rows: Which output features to compute.

        Returns:
            (out_features, in_features), or the rows asked for, in `merge_dtype`.
        """
        dtype = self.merge_dtype
        with torch.autocast(self.weight.device.type, enabled=False):
            scaling = self.scaling.to(dtype) if isinstance(self.scaling, Tensor) else self.scaling
            return (self.lora_B[rows].to(dtype) * scaling) @ self.lora_A.to(dtype)

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
            )
            self.lora_A.copy_(FACTOR_INITS[self.config.factor_init].draw(draw))
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

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices of output features small enough for float64 work on them to stay cheap in memory."""
        step = max(1, _BLOCK_ENTRIES // self.in_features)
        for first in range(0, self.out_features, step):
            yield slice(first, min(first + step, self.out_features))

    def weight_rows(self, rows: slice) -> Tensor:
        """Return a view of the base as the forward pass uses it: (rows, in_features), in its dtype."""
        return self._by_rows(self.weight)[rows]

    def master_rows(self, rows: slice) -> Tensor:
        """Return the base at merge precision: (rows, in_features), at least float32."""
        return self._master.read(self.weight_rows(rows), self._residual_rows(rows))

    def write_master_rows_(self, rows: slice, value: Tensor) -> None:
        """Store the base at merge precision; call `claim_residual_` after the last block."""
        self._master.write_(self.weight_rows(rows), self._residual_rows(rows), value)

    def drop_stale_residual_(self) -> None:
        """Forget the residual if somebody has written the weight since it was split: the weight is right."""
        if self.weight_residual is None or self.weight.is_meta:
            return
        if self._residual_owner is None or bool(self._residual_owner != fingerprint(self.weight)):
            self.weight_residual.zero_()
            self.claim_residual_()

    def claim_residual_(self) -> None:
        """Record that the residual belongs to the weight as it stands."""
        split = self.weight_residual is not None and not self.weight.is_meta
        self._residual_owner = fingerprint(self.weight) if split else None

    @property
    def _master(self) -> Master:
        return master_for(self.weight.dtype, merge_precision=self.config.merge_precision)

    def _by_rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().T if self.is_transposed else tensor.detach()

    def _residual_rows(self, rows: slice) -> Tensor | None:
        residual = elements(self.weight_residual)
        return None if residual is None else self._by_rows(residual)[rows]

    def _fit_residual(self) -> None:
        self._refuse_dtype(self.weight.dtype)
        self.weight_residual = self._master.new_residual(self.weight.detach())
        self.claim_residual_()

    def _refuse_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in SUPPORTED_DTYPES:
            raise ConfigError(f"{self.name or 'the layer'}: a base of dtype {dtype} cannot be merged into")

    def _rewrite_master_(self, value: Tensor) -> None:
        """Take `value`, in the weight's layout, as the base's master, whatever its dtype is now."""
        self._fit_residual()
        self._master.write_(self.weight.detach(), elements(self.weight_residual), value)
        self.claim_residual_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(dtype)` must neither lose the master's lower bits, nor narrow the factors, nor leave a
        # residual of the old dtype; and what comes from the meta device has yet to be drawn.
        was_meta = self.weight.is_meta
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        self._refuse_dtype(probe.dtype)
        value: Tensor | None = None
        if probe.dtype != self.weight.dtype and not (was_meta or probe.is_meta):
            self.drop_stale_residual_()
            value = self._master.read(self.weight.detach(), elements(self.weight_residual)).clone()
        factors = [p for name in _FACTORS if (p := getattr(self, name)) is not None]
        wide = (self.weight_residual, *factors, *(p.grad for p in factors))
        super()._apply(keeping_float32(fn, wide), recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if value is not None:
                self._rewrite_master_(value.to(self.weight.device))
            elif was_meta or probe.is_meta:
                self._fit_residual()
        self._draw_pending_()
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_stale_residual_()  # a checkpoint holds the weight with its own residual
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        entries = cast(dict[str, Any], state_dict)
        own = {name: p for name in _FACTORS if (p := getattr(self, name)) is not None}
        weight = entries.get(prefix + "weight")
        residual = entries.pop(prefix + "weight_residual", None)
        if prefix + "lora_A" in entries:
            self._pending_draw = None
        elif weight is not None and not any(prefix + name in entries for name in own):
            # A checkpoint of the plain model: its function is the base alone, so the delta becomes 0.
            for name, p in own.items():
                value = torch.empty_like(p, device=weight.device) if p.is_meta else p.detach().clone()
                entries[prefix + name] = value
            entries[prefix + "lora_B"].zero_()
        if self.weight_residual is not None:
            entries[prefix + "weight_residual"] = self.weight_residual  # the loaded one is split anew below
        super()._load_from_state_dict(entries, prefix, *args, **kwargs)
        self._draw_pending_()
        if weight is None or weight.shape != self.weight.shape or self.weight.is_meta:
            return
        loaded_as = master_for(weight.dtype, merge_precision="native" if residual is None else "float32")
        with torch.no_grad():
            self._rewrite_master_(loaded_as.read(weight, elements(residual)).to(self.weight.device))

    def extra_repr(self) -> str:
        """Show the shape, rank and scaling in `print(model)`."""
        scaling = "learned" if self.lora_scaling is not None else f"{self.fixed_scaling:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={self.config.rank}, scaling={scaling}, "
            f"factors={self.config.factors!r}"
        )


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
