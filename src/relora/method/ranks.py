"""Agreement between data-parallel ranks, where torch.distributed runs; alone, nothing happens.

Every rank makes the same calls in the same order, on the default process group.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, in place."""
    if num_ranks() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def take_from_first_rank_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by what the first rank has, in place."""
    if num_ranks() > 1:
        for work in [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors]:
            work.wait()
