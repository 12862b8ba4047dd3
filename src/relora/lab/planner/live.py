"""Count the bytes of tensors that are alive, by what they are for, and the most there ever were.

Every operation passes through a dispatch mode; each new storage is counted once, until Python frees it. The
same count serves real tensors and fake ones, which have shapes and no memory; asked for its value, a fake one
answers 1.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
# The CPU's fused attention takes the same first arguments as the GPU's, which alone the registry knows.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}

_ANSWERS = {_ATEN._local_scalar_dense.default: 1, _ATEN.equal.default: True}

CAST = "casts"
"""The label of copies of parameters in another dtype, whoever makes them."""


@dataclass(kw_only=True)
class _Storage:
    alive: weakref.ref[torch.UntypedStorage]
    num_bytes: int
    label: str


class LiveBytes(TorchDispatchMode):
    """Live bytes by label, their peak, and the FLOPs of the matrix products that pass by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.label = ""
        """What storages made from now on are for."""
        self.bytes: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        """The labels' bytes when their sum was largest."""
        self.label_peaks: Counter[str] = Counter()
        """The most bytes of each label by itself."""
        self.peaks: dict[Hashable, Counter[str]] = {}
        """The labels' bytes when their sum was largest, in each moment that was begun."""
        self.flops = 0
        self._moments: tuple[Hashable, ...] = ()
        self._moment_peaks: dict[Hashable, int] = {}
        self._known: dict[int, _Storage] = {}
        self._parameters: set[int] = set()
        self._total = self._peak = 0

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return self._total

    @property
    def peak(self) -> int:
        """Most bytes alive since construction, or `restart_peak`."""
        return self._peak

    def restart_peak(self) -> None:
        """Forget peaks and FLOPs so far; what is alive stays counted."""
        self._peak, self.at_peak, self.flops = self._total, Counter(self.bytes), 0
        self.label_peaks = Counter(self.bytes)

    def begin(self, *moments: Hashable) -> None:
        """Keep peaks under these names from now on, each the most of all its stretches of time."""
        self._moments = moments
        self._compare()

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no more: it is not on the device."""
        storage = self._known[tensor.untyped_storage()._cdata]
        self._total -= storage.num_bytes
        self.bytes[storage.label] -= storage.num_bytes
        storage.num_bytes = 0

    def count(self, tensors: Iterable[Tensor], label: str, *, are_parameters: bool = False) -> None:
        """Count tensors that were made before; those counted already keep their label."""
        for tensor in tensors:
            self._count(tensor, label)
            if are_parameters:
                self._parameters.add(tensor.untyped_storage()._cdata)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Count a tensor that is counted already under another label from now on."""
        storage = self._known[tensor.untyped_storage()._cdata]
        self.bytes[storage.label] -= storage.num_bytes
        storage.label = label
        self._add(label, storage.num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.ops.prim.device.default:
            return func(*args)
        if func in _ANSWERS and isinstance(args[0], FakeTensor):
            return _ANSWERS[
                func
            ]  # true, finite, not zero: whatever a step asks of a value, its usual course follows
        most = _most(func, args) if isinstance(args[0] if args else None, FakeTensor) else None
        out = func(*args, **(kwargs or {})) if most is None else most
        label = self.label
        if func is _ATEN._to_copy.default and args[0].untyped_storage()._cdata in self._parameters:
            label = CAST
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf, label)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        alive = weakref.ref(storage, lambda _: self._drop(key))
        self._known[key] = _Storage(alive=alive, num_bytes=num_bytes, label=label)
        self._total += num_bytes
        self._add(label, num_bytes)
        self._compare()

    def _compare(self) -> None:
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, Counter(self.bytes)
        for moment in self._moments:
            if self._total > self._moment_peaks.get(moment, -1):
                self._moment_peaks[moment], self.peaks[moment] = self._total, Counter(self.bytes)

    def _add(self, label: str, num_bytes: int) -> None:
        self.bytes[label] += num_bytes
        self.label_peaks[label] = max(self.label_peaks[label], self.bytes[label])

    def _drop(self, key: int) -> None:
        storage = self._known.pop(key)
        self._parameters.discard(key)
        self._total -= storage.num_bytes
        self.bytes[storage.label] -= storage.num_bytes


def _most(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """Return the largest output there can be, where its size is a matter of values; None where it is not."""
    tensor: Tensor = args[0]
    if func is _ATEN.nonzero.default:
        return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)
    if func is _ATEN.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
        mask: Tensor = args[1][0]
        return tensor.new_empty((mask.numel(), *tensor.shape[mask.ndim :]))
    return None
