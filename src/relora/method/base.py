"""FrozenBase: the frozen weight of a low-rank layer, how it is stored, and where its exact value is.

Three tensors spell a base. `weight` is what the forward pass reads, on the device: the plain layer's own
Parameter, or that Parameter holding bfloat16 or codes instead (`base_dtype`). The *residual* is what the
weight lacks of the exact value merges accumulate in (module `master`); it stands beside the weight as a
buffer, or in host memory (`master="host"`). `weight_scale` belongs to codes.

The weight is written by restarts and loads alone, which write the residual with it, so a forward never casts
or refreshes anything. If somebody else has written the weight, a checksum of its bits tells, and the weight
is right: whatever reads the exact value (merge, cast, checkpoint) forgets the residual first.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from relora.errors import ConfigError
from relora.method.codecs import BaseCodec, base_codec
from relora.method.config import ReLoRAConfig
from relora.method.master import SUPPORTED_DTYPES, Master, elements, fingerprint, keeping, master_for
from relora.method.shards import is_sharded, local

# Work on the exact value goes over blocks of rows: a few float64 copies of a fraction of a layer are less
# than the layer itself. A block has this many entries at least, so that a small layer's time is not all
# Python's; its copies are about a megabyte at most. A GPU has larger ones, of 32 megabytes a copy: a small
# block would keep it busy for less time than it takes to ask.
_BLOCKS = 32
_LEAST_BLOCK_ENTRIES = 3 << 12
_LEAST_BLOCK_ENTRIES_ON_A_GPU = 1 << 22


class FrozenBase(nn.Module):
    """A frozen weight and its exact value, under every cast, move, load and save."""

    weight: nn.Parameter
    weight_residual: Tensor | None
    weight_scale: Tensor | None

    config: ReLoRAConfig
    name: str
    is_transposed: bool
    in_features: int
    out_features: int
    _codec: BaseCodec | None
    _plain_dtype: torch.dtype
    _host_residual: Tensor | None
    _residual_owner: Tensor | None

    @torch.no_grad()
    def _adopt_base_(self) -> None:
        """Take the plain layer's weight over, stored as the config asks."""
        self.weight.requires_grad_(False).grad = None
        self._plain_dtype, self._codec = self.weight.dtype, base_codec(self.config.base_dtype)
        self._host_residual = None
        self.register_buffer("weight_residual", None)
        self.register_buffer("weight_scale", None, persistent=False)
        # A buffer too, so that whoever copies or broadcasts weights and buffers keeps them together.
        self.register_buffer("_residual_owner", None, persistent=False)
        value = self.weight.detach()
        self._store_as_configured_()
        if self.config.base_dtype == "keep" or self.weight.is_meta:
            self._fit_residual()
        else:
            self._rewrite_master_(value)

    def _store_as_configured_(self) -> None:
        """Give the weight the dtype and shape of `base_dtype`; its values are then written by the caller."""
        # `.data` is set as nn.Module.to sets it: the Parameter stays the one that others hold.
        if self._codec is not None:
            rows = self._by_rows(self.weight).float()
            self.weight.data, self.weight_scale = self._codec.encode(rows)
        elif self.config.base_dtype == "bf16":
            self.weight.data = self.weight.data.to(torch.bfloat16)

    def _release_base_(self) -> None:
        """Give the weight back as the plain layer had it, with the exact value."""
        if self.config.base_dtype != "keep":
            plain = torch.empty(self._plain_shape, dtype=self._plain_dtype, device=self.weight.device)
            for rows in self.row_blocks():
                self._by_rows(plain)[rows] = self.master_rows(rows).to(self._plain_dtype)
            self.weight.data = plain

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of the values that the weight can hold."""
        return torch.float32 if self._codec else self.weight.dtype

    @property
    def base_parts(self) -> tuple[Tensor, ...]:
        """The weight as stored: itself, or codes and scales."""
        return (self.weight,) if self.weight_scale is None else (self.weight, self.weight_scale)

    @property
    def host_residual(self) -> Tensor | None:
        """The part of the exact value that is in host memory; None where the device holds all of it."""
        return self._host_residual

    @property
    def _plain_shape(self) -> tuple[int, int]:
        sides = (self.out_features, self.in_features)
        return sides[::-1] if self.is_transposed else sides

    @property
    def num_rows(self) -> int:
        """How many output features this process holds: all of them, unless the layer is sharded."""
        return len(local(self.weight)) if is_sharded(self.weight) else self.out_features

    def row_blocks(self) -> Iterator[slice]:
        """Yield slices of the output features that are here, small enough for float64 work on them to stay
        cheap in memory.
        """
        is_on_gpu = self.weight.device.type == "cuda"
        least = _LEAST_BLOCK_ENTRIES_ON_A_GPU if is_on_gpu else _LEAST_BLOCK_ENTRIES
        entries = max(least, self.num_rows * self.in_features // _BLOCKS)
        step = max(1, entries // self.in_features)
        for first in range(0, self.num_rows, step):
            yield slice(first, min(first + step, self.num_rows))

    def weight_rows(self, rows: slice) -> Tensor:
        """Return the base as the forward pass uses it: (rows, in_features), a view of it or decoded."""
        if self._codec is None:
            return self._by_rows(self.weight)[rows]
        assert self.weight_scale is not None
        stored, scale = self.weight.detach()[rows], self.weight_scale[rows]
        return self._codec.decode(stored, scale, columns=self.in_features, dtype=torch.float32)

    def master_rows(self, rows: slice) -> Tensor:
        """Return the base at merge precision: (rows, in_features), at least float32."""
        residual = self._residual_rows(rows)
        if self._codec is not None:  # the residual is the value: nothing need be decoded
            assert residual is not None
            return residual
        return self._master.read(self.weight_rows(rows), residual)

    def write_master_rows_(self, rows: slice, value: Tensor) -> None:
        """Store the base at merge precision; call `claim_residual_` after the last block."""
        residual = self._residual_rows(rows)
        if self._codec is None:
            self._master.write_(self.weight_rows(rows), residual, value)
        else:
            assert residual is not None and self.weight_scale is not None
            residual.copy_(value)
            stored, scale = self._codec.encode(residual)
            self.weight.detach()[rows] = stored
            self.weight_scale[rows] = scale
        if self._host_residual is not None and residual is not None and residual.device.type != "cpu":
            host = elements(self._host_residual)
            assert host is not None
            self._by_rows(host)[rows].copy_(residual, non_blocking=True)

    def drop_stale_residual_(self) -> None:
        """Forget the residual if somebody has written the weight since it was split: the weight is right."""
        if self._residual is None or self.weight.is_meta:
            return
        if self._residual_owner is None or bool(self._residual_owner != fingerprint(local(self.weight))):
            self._clear_residual_()
            self.claim_residual_()

    def claim_residual_(self) -> None:
        """Record that the residual belongs to the weight as it stands."""
        split = self._residual is not None and not self.weight.is_meta
        self._residual_owner = fingerprint(local(self.weight)) if split else None
        if self._host_residual is not None and self.weight.device.type == "cuda":
            torch.cuda.synchronize(self.weight.device)  # its rows may still be on their way to the host

    @property
    def _master(self) -> Master:
        return master_for(
            self.weight.dtype, merge_precision=self.config.merge_precision, is_coded=self._codec is not None
        )

    @property
    def _residual(self) -> Tensor | None:
        return self.weight_residual if self._host_residual is None else self._host_residual

    def _by_rows(self, tensor: Tensor) -> Tensor:
        here = local(tensor.detach())
        return here.T if self.is_transposed else here

    def _residual_rows(self, rows: slice) -> Tensor | None:
        residual = elements(self._residual)
        return (
            None
            if residual is None
            else self._by_rows(residual)[rows].to(self.weight.device, non_blocking=True)
        )

    def _fit_residual(self) -> None:
        """Start a residual for a weight that is exact as it stands."""
        self._new_residual_()
        if self._codec is not None and not self.weight.is_meta:
            self._clear_residual_()
        self.claim_residual_()

    def _new_residual_(self) -> None:
        self._refuse_dtype(self.weight.dtype)
        is_on_host = self.config.master == "host" and not self.weight.is_meta
        device = torch.device("cpu") if is_on_host else self.weight.device
        residual = self._master.new_residual(self._plain_shape, device=device)
        self._host_residual = residual if is_on_host else None
        self.weight_residual = None if is_on_host else residual
        self._pin_host_residual_()

    def _pin_host_residual_(self) -> None:
        """Pin what a GPU reads from the host, so that copies to and from it are asynchronous."""
        if self._host_residual is not None and self.weight.device.type == "cuda":
            self._host_residual = self._host_residual.pin_memory()

    def _clear_residual_(self) -> None:
        """Make the weight exact as it stands, in place."""
        residual = self._residual
        assert residual is not None
        if self._codec is None:
            residual.zero_()
        else:
            for rows in self.row_blocks():
                self._by_rows(residual)[rows].copy_(self.weight_rows(rows))

    def _refuse_dtype(self, dtype: torch.dtype) -> None:
        if self._codec is None and dtype not in SUPPORTED_DTYPES:
            raise ConfigError(f"{self.name or 'the layer'}: a base of dtype {dtype} cannot be merged into")

    def _rewrite_master_(self, value: Tensor) -> None:
        """Take `value`, in the plain weight's layout, as the base's exact value, whatever its dtype is."""
        self._new_residual_()
        for rows in self.row_blocks():
            self.write_master_rows_(rows, self._by_rows(value)[rows].to(self.weight.device))
        self.claim_residual_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(dtype)` must neither lose the exact value's lower bits, nor leave a residual of the old
        # dtype; a base whose dtype the config decides keeps it.
        was_meta, is_fixed = self.weight.is_meta, self.config.base_dtype != "keep"
        probe = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device))
        plain = fn(torch.empty(0, dtype=self._plain_dtype, device=self.weight.device))
        self._refuse_dtype(probe.dtype if not is_fixed else self.weight.dtype)
        value: Tensor | None = None
        if probe.dtype != self.weight.dtype and not (is_fixed or was_meta or probe.is_meta):
            self.drop_stale_residual_()
            value = torch.cat([self.master_rows(rows) for rows in self.row_blocks()])
            value = value.T if self.is_transposed else value
        kept = (self.weight_residual, self.weight_scale)
        super()._apply(keeping(fn, wide=kept, same=(self.weight,) if is_fixed else ()), recurse)  # type: ignore[no-untyped-call]
        self._plain_dtype = plain.dtype
        self._pin_host_residual_()
        with torch.no_grad():
            if value is not None:
                self._rewrite_master_(value.to(self.weight.device))
            elif was_meta or probe.is_meta:
                self._fit_residual()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.drop_stale_residual_()  # a checkpoint holds the weight with its own residual
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._codec is not None:
            destination[prefix + "weight"] = (
                self._residual
            )  # codes stay here: what is saved is the plain weight
            destination.pop(prefix + "weight_residual", None)
        elif self._host_residual is not None:
            destination[prefix + "weight_residual"] = self._host_residual

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        entries = cast(dict[str, Any], state_dict)
        weight = entries.get(prefix + "weight")
        residual = entries.pop(prefix + "weight_residual", None)
        if self.weight_residual is not None:
            entries[prefix + "weight_residual"] = self.weight_residual  # the loaded one is split anew below
        fits = weight is not None and weight.shape == self._plain_shape
        if self._codec is not None and weight is not None:
            entries[prefix + "weight"] = self.weight.detach()  # codes have a shape of their own
            if not fits:
                args[-1].append(
                    f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the checkpoint, "
                    f"{self._plain_shape} here"
                )
        super()._load_from_state_dict(entries, prefix, *args, **kwargs)
        if weight is None or not fits or self.weight.is_meta:
            return
        loaded_as = master_for(weight.dtype, merge_precision="native" if residual is None else "float32")
        with torch.no_grad():
            value = loaded_as.read(weight, elements(residual)).to(self.weight.device)
            if self._codec is None:
                self._store_as_configured_()
            self._rewrite_master_(value)
