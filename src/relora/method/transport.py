"""`reset="transport"`: carry the optimizer's memory of lora_B into the new lora_A's coordinates (H4).

With factors "B", the gradient of lora_B is s G A^T: what Adam remembers of G is seen through the orthonormal
rows of A. A restart replaces A_old by A_new; with R = A_old A_new^T, (rank, rank),

    first moments, linear in G:      m <- m R
    second moments, of its square:   v <- v (R * R) + rowmean(v) (1 - colsum(R * R)),  at least 0

m R is exactly the old moment's part that the new rows can see. v keeps no signs, so it is mixed by the
squares (each column of R * R sums to at most 1), and what a new direction has outside the old rows gets the
mean of its row: no direction starts with v near 0, so nothing overshoots and nothing needs a re-warm. Step
counts stay. Rows without any overlap (R = 0) leave m = 0 and v = its row mean.

With both factors lora_A moves within the cycle and is not orthonormal, and lora_A's own moments belong to a
lora_B that the restart sets to 0; there is nothing exact to carry, and ReLoRAConfig refuses it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.errors import ConfigError, OptimizerResetError
from relora.method.adapters import OptimizerAdapter, State, adapter_for
from relora.method.linear import LoRALinear
from relora.method.reset import ParameterReset, ResetReport, check_resettable


def overlap(old_A: Tensor, layer: LoRALinear) -> Tensor:
    """Return A_old A_new^T, (rank, rank), of a layer that has its new lora_A, at merge precision."""
    return old_A.to(layer.merge_dtype) @ layer.whole_lora_A().T


def carried_first(moment: Tensor, overlap: Tensor) -> Tensor:
    """Return a first moment (out, rank) in the new coordinates; `overlap` is A_old A_new^T."""
    return moment @ overlap


def carried_second(moment: Tensor, overlap: Tensor) -> Tensor:
    """Return a second moment (out, rank) in the new coordinates."""
    squares = overlap.square()
    unseen = (1 - squares.sum(0)).clamp(min=0)
    return (moment @ squares + moment.mean(1, keepdim=True) * unseen).clamp(min=0)


def refuse_untransportable(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose moments are not known to be linear or quadratic in the gradient.

    Raises:
        ConfigError: naming them.
    """
    adapter = adapter_for(optimizer)
    unknown = [moment for moment in adapter.moments if moment not in (*adapter.first, *adapter.second)]
    if unknown:
        raise ConfigError(
            f"reset='transport' does not know how {', '.join(map(repr, unknown))} of "
            f"{type(optimizer).__name__} change with the factors' coordinates: choose reset='zero' or "
            "'none', or register an adapter that names `first` and `second` moments (relora.method.adapters)"
        )


@torch.no_grad()
def transport_optimizer_state_(
    optimizer: Optimizer, params: Sequence[tuple[str, nn.Parameter]], *, overlaps: Mapping[str, Tensor]
) -> ResetReport:
    """Carry the moments of every lora_B across a restart, in place; every other state stays bit-identical.

    Args:
        optimizer: One with an adapter that names its `first` and `second` moments.
        params: (name, lora_B) pairs.
        overlaps: By the same names, A_old A_new^T, (rank, rank), float64.

    Raises:
        ConfigError: for an optimizer, a state or a parameter that cannot be carried.
        NonFiniteError: if a state holds NaN or infinity; nothing has changed then.
        OptimizerResetError: if a state does not read as it should afterwards.
    """
    refuse_untransportable(optimizer)
    missing = [name for name, _ in params if name not in overlaps]
    if missing:
        raise ConfigError(f"reset='transport': no overlap of old and new lora_A is given for {missing[0]}")
    check_resettable(optimizer, params, method="transport")
    adapter = adapter_for(optimizer)
    with_state = [(name, optimizer.state[p]) for name, p in params if optimizer.state.get(p)]
    return ResetReport(
        method="transport",
        parameters=tuple(_carry_(adapter, state, name, overlaps[name]) for name, state in with_state),
        without_state=tuple(name for name, p in params if not optimizer.state.get(p)),
        step_counts_reset=0,
    )


def _carry_(adapter: OptimizerAdapter, state: State, name: str, overlap: Tensor) -> ParameterReset:
    moments = adapter.held_moments(state)
    carried = 0
    for moment in moments:
        values = adapter.read(state, moment)
        carry = carried_first if moment in adapter.first else carried_second
        wanted = carry(values.to(overlap), overlap).to(values.dtype)
        adapter.write_(state, moment, wanted)
        off = (adapter.read(state, moment) - wanted).abs().max()
        if not bool(off <= adapter.write_tolerance * wanted.abs().max()):
            raise OptimizerResetError(
                f"transport of {moment!r} of {name}: what was written reads {float(off):.3g} away from it: "
                f"{type(adapter).__name__} for {adapter.optimizer.__name__} is broken"
            )
        carried += values.numel()
    return ParameterReset(
        name=name,
        num_states=len(moments),
        entries=carried,
        entries_targeted=0,
        entries_zeroed=0,
        entries_carried=carried,
    )
