"""Merge factors into the base and start new ones (paper Algorithm 1, lines 8 to 10).

    W <- keep * W + scaling * lora_B @ lora_A,    lora_A <- new,    lora_B <- 0

The sum is taken in float64 from the base's master (module `master`) and rounded once. Every layer is checked
before any is written, and every write is measured against its float64 reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm as norm

from relora.errors import ConfigError, NonFiniteError
from relora.method.factor_init import FACTOR_INITS
from relora.method.linear import LoRALinear, lora_layers
from relora.method.ranks import take_from_first_rank_
from relora.method.refusals import refuse_unmergeable
from relora.method.shards import is_sharded, is_true_anywhere, local, reduce_over_shards_, reshard_, whole


@dataclass(frozen=True, kw_only=True)
class LayerMerge:
    """What a merge did to one layer."""

    name: str
    delta_norm: float
    """Frobenius norm of the delta that was merged; 0 means the factors learned nothing in this cycle."""
    max_abs_delta: float
    max_function_change: float
    """Largest absolute change of the weight that the forward pass applies (base + delta) by the merge."""
    relative_merge_error: float
    """Norm of what the base did not take of the delta, over the delta's norm; 0 where the delta is 0."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, by layer and in total."""

    layers: tuple[LayerMerge, ...]

    @property
    def max_function_change(self) -> float:
        """Largest change of any layer's function weight."""
        return max(layer.max_function_change for layer in self.layers)

    @property
    def relative_merge_error(self) -> float:
        """Largest relative merge error of any layer."""
        return max(layer.relative_merge_error for layer in self.layers)

    @property
    def unmoved_layers(self) -> tuple[str, ...]:
        """Layers whose delta was exactly 0."""
        return tuple(layer.name for layer in self.layers if layer.delta_norm == 0)


def merge_and_reinit_(model: nn.Module, *, seed: int, restart_index: int) -> MergeReport:
    """Merge every layer's delta into its base and start new factors, in place, on every rank or on none.

    Args:
        model: An injected model, or a wrapper around one.
        seed: Root of the new factors' seeds.
        restart_index: Which restart this is, counted from 1; with `seed` and a layer's name it determines
            that layer's new lora_A.

    Raises:
        ConfigError: if the model holds no factors, or is sharded in a way that cannot be merged.
        NonFiniteError: if any merged weight would not be finite; nothing has changed then.
    """
    reshard_(model)
    layers = lora_layers(model)
    report = merge_(layers)
    reinit_(layers, seed=seed, restart_index=restart_index)
    return report


def reinit_(layers: Sequence[LoRALinear], *, seed: int, restart_index: int) -> None:
    """Start new factors in every layer: lora_A drawn, lora_B zero. Every rank calls it, or none."""
    for layer in layers:
        layer.reinit_(seed=seed, restart_index=restart_index)
    # Ranks draw the same numbers; whether a GPU's linear algebra has the same bits is not left to chance.
    # (A sharded lora_A is taken from the first rank before it is cut.)
    made_there = [layer for layer in layers if FACTOR_INITS[layer.config.factor_init].is_made_on_device]
    rows = [layer.lora_A.detach() for layer in made_there if not is_sharded(layer.lora_A)]
    take_from_first_rank_([lora_A for lora_A in rows if lora_A.is_cuda])


@torch.no_grad()
def merge_(layers: Sequence[LoRALinear], *, keep: float = 1.0) -> MergeReport:
    """Add every layer's delta to `keep` times its base; the factors stay as they are.

    Args:
        layers: The layers to merge.
        keep: What weight decay leaves of the base.

    Raises:
        ConfigError: if a layer is sharded in a way that cannot be merged, or its lora_A no longer selects
            inputs with init="columns".
        NonFiniteError: naming every layer whose merged weight would not be finite; nothing has changed then.
    """
    refuse_unmergeable(layers)
    changed = [layer.name or "the layer" for layer in layers if not layer.could_be_rows(layer.lora_A)]
    if changed:
        raise ConfigError(
            f"merge refused, no weight was changed: lora_A was written to in {', '.join(changed)}, and with "
            'init="columns" each row must select one input (a single 1), as the forward pass has taken it to'
        )
    for layer in layers:
        layer.drop_stale_residual_()
    broken = [layer.name or "the layer" for layer in layers if not _is_mergeable(layer, keep)]
    if broken:
        raise NonFiniteError(
            f"merge refused, no weight was changed: the merged weight would not be finite in "
            f"{', '.join(broken)}. Go back to the last good checkpoint; lower the factors' learning rate."
        )
    return MergeReport(layers=tuple(_merge_layer_(layer, keep) for layer in layers))


def _is_mergeable(layer: LoRALinear, keep: float) -> bool:
    """Tell whether all merged weights would be finite, on every rank."""
    lora_A = whole(layer.lora_A.detach())  # by every rank, also by one without rows
    is_broken = layer.num_rows > 0 and not _rows_are_mergeable(layer, lora_A, keep)
    return not is_true_anywhere(is_broken, layer.weight)


def _rows_are_mergeable(layer: LoRALinear, lora_A: Tensor, keep: float) -> bool:
    """Tell whether the rows here would be finite: by a bound, which costs no product, or one by one."""
    if _bound(layer, lora_A, keep) < torch.finfo(layer.value_dtype).max / 2:
        return True
    lora_A = lora_A.to(layer.merge_dtype)
    finite = [
        _sum(layer.master_rows(rows), layer.delta(rows, lora_A=lora_A), keep)
        .to(layer.value_dtype)
        .isfinite()
        .all()
        for rows in layer.row_blocks()
    ]
    return bool(torch.stack(finite).all())


def _bound(layer: LoRALinear, lora_A: Tensor, keep: float) -> float:
    """Return what no merged weight exceeds in size (Cauchy and Schwarz); not finite if something is not."""
    of_delta = norm(local(layer.lora_B), dim=1).amax() * norm(lora_A, dim=0).amax() * layer.scaling
    of_base = torch.stack([norm(layer.master_rows(rows), math.inf) for rows in layer.row_blocks()]).amax()
    return float(of_base * keep + of_delta.abs())


def _sum(base: Tensor, delta: Tensor, keep: float) -> Tensor:
    """Return keep * base + delta in the delta's dtype, a new tensor."""
    total = base.to(delta.dtype, copy=True)
    return (total if keep == 1 else total.mul_(keep)).add_(delta)


def _merge_layer_(layer: LoRALinear, keep: float) -> LayerMerge:
    sums = torch.zeros(2, dtype=layer.merge_dtype, device=layer.weight.device)
    peaks = torch.zeros_like(sums)
    lora_A = layer.whole_lora_A()
    for rows in layer.row_blocks():
        delta = layer.delta(rows, lora_A=lora_A)
        target = _sum(layer.master_rows(rows), delta, keep)
        function = _sum(layer.weight_rows(rows), delta, keep)
        sizes, largest = [norm(delta)], [norm(delta, math.inf)]
        del delta
        layer.write_master_rows_(rows, target)
        # What was wanted makes room for what is missing.
        sizes.append(norm(target.sub_(layer.master_rows(rows))))
        largest.append(norm(function.sub_(layer.weight_rows(rows)), math.inf))
        sums += torch.stack(sizes).square()
        peaks = torch.maximum(peaks, torch.stack(largest))
    layer.claim_residual_()
    reduce_over_shards_(sums, layer.weight, "sum")
    reduce_over_shards_(peaks, layer.weight, "max")
    delta_norm, lost_norm = (math.sqrt(value) for value in sums.tolist())
    max_abs_delta, max_function_change = peaks.tolist()
    return LayerMerge(
        name=layer.name,
        delta_norm=delta_norm,
        max_abs_delta=max_abs_delta,
        max_function_change=max_function_change,
        relative_merge_error=lost_norm / delta_norm if delta_norm else 0.0,
    )
