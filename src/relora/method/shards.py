"""Layers that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: each rank holds some of their rows.

The base and lora_B are cut alike, by output features, so a rank merges the rows it holds with a lora_A that
is gathered from all ranks; what a report says is of all rows. A tensor that is whole is its own part here,
and its own whole. Of tensors that may be sharded, every rank calls the same functions in the same order.
"""

import sys
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relora.method.ranks import take_from_first_rank_


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: the same memory."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from all ranks."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def own_part(value: Tensor, like: Tensor) -> Tensor:
    """Return of a value that every rank has whole what this rank holds of `like`, which has as many rows."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    # No rank's value is sent: all have the same.
    return distribute_tensor(value, there.device_mesh, there.placements, src_data_rank=None).to_local()


def write_whole_(target: Tensor, value: Tensor) -> None:
    """Give a tensor a value that every rank has made; where each takes a part of it, the first rank's."""
    if is_sharded(target):
        take_from_first_rank_([value])
    local(target).copy_(own_part(value, target))


def first_row(like: Tensor) -> int:
    """Return which of all rows of `like` is the first that this rank holds; 0 where it holds none."""
    if not is_sharded(like):
        return 0
    rows = own_part(torch.arange(len(like), device=like.device), like)
    return int(rows[0]) if len(rows) else 0


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Return all rows of something of which each rank has made the rows that it holds of `like`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    there = cast(Any, like)
    rows = DTensor.from_local(
        part, there.device_mesh, there.placements, shape=like.shape, stride=like.stride()
    )
    return rows.full_tensor()


def reduce_over_shards_(value: Tensor, like: Tensor, by: Literal["sum", "max"]) -> None:
    """Reduce a value in place over the ranks that share `like`."""
    for dim, placement in enumerate(getattr(like, "placements", ())):
        if placement.is_shard():
            _reduce_(value, like, dim, by)


def is_true_anywhere(flag: bool, like: Tensor) -> bool:
    """Return whether a flag is set on any rank that holds a part of `like`, or a copy of one."""
    if not is_sharded(like):
        return flag
    value = torch.tensor(float(flag), device=like.device)
    for dim in range(cast(Any, like).device_mesh.ndim):
        _reduce_(value, like, dim, "max")
    return bool(value)


def _reduce_(value: Tensor, like: Tensor, dim: int, by: Literal["sum", "max"]) -> None:
    op = dist.ReduceOp.SUM if by == "sum" else dist.ReduceOp.MAX
    dist.all_reduce(value, op, group=cast(Any, like).device_mesh.get_group(dim))


def reshard_(model: nn.Module) -> None:
    """Have modules that still hold whole parameters after a forward pass go back to those that they train.

    FSDP2 leaves its root so until a backward pass; what is written there meanwhile is lost.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
