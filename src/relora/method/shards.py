"""Layers that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded: each rank holds some of their rows.

The base and lora_B are cut alike, by output features, so a rank merges the rows it holds with a lora_A that
is gathered from all ranks; what a report says is of all rows. A tensor that is whole is its own part here,
and its own whole. Of tensors that may be sharded, every rank calls the same functions in the same order.
"""

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from relora.errors import ConfigError


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
    """Return of a value that every rank has whole what this rank holds of `like`, of the same shape."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    # No rank's value is sent: all have the same.
    return distribute_tensor(value, there.device_mesh, there.placements, src_data_rank=None).to_local()


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


def reduce_over_shards_(value: Tensor, like: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """Reduce a value in place over the ranks that share `like`."""
    for dim, placement in enumerate(getattr(like, "placements", ())):
        if placement.is_shard():
            dist.all_reduce(value, op, group=cast(Any, like).device_mesh.get_group(dim))


def reshard_(model: nn.Module) -> None:
    """Have modules that still hold whole parameters after a forward pass go back to those that they train.

    FSDP2 leaves its root so until a backward pass; what is written there meanwhile is lost.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def refuse_unfit_shards(named: Sequence[tuple[str, nn.Parameter, nn.Parameter]]) -> None:
    """Refuse layers of which this process holds a part that it cannot merge by itself.

    Args:
        named: Name, base and lora_B of each layer.

    Raises:
        ConfigError: naming the first.
    """
    for name, base, lora_B in named:
        if base.ndim != 2 or lora_B.ndim != 2:
            raise ConfigError(
                f"{name} is sharded by FullyShardedDataParallel, which cuts weights regardless of rows: use "
                "fully_shard (FSDP2), or DistributedDataParallel"
            )
        placements = [getattr(p, "placements", ()) for p in (base, lora_B)]
        if not any(placements):
            continue
        by_rows = all(p.is_replicate() or p.is_shard(0) for p in placements[0])
        if placements[0] != placements[1] or not by_rows or len(local(base)) != len(local(lora_B)):
            raise ConfigError(
                f"{name} is sharded otherwise than by its rows, as fully_shard does it: the base is placed "
                f"{placements[0]}, lora_B {placements[1]}; shard whole layers, by dimension 0"
            )
