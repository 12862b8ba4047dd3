"""Two processes of one group, for what ranks must agree on."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_IMPORTS = ["torch.distributed", "torch._dynamo", "relora", "loops", "pytest"]
"""What takes seconds; optimizers import torch._dynamo at their first step."""


def on_two_ranks(work: Callable[..., object], *arguments: object) -> tuple[Any, Any]:
    """Return what `work(rank, *arguments)` returns on each of two gloo ranks: tensors and plain values.

    Processes are forked from a server that has imported what they need, instead of importing it in each.
    """
    multiprocessing.set_forkserver_preload(_IMPORTS)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_on_a_rank, (folder, work, arguments), nprocs=2, start_method="forkserver")
        first, second = (torch.load(Path(folder, f"rank{rank}.pt")) for rank in (0, 1))
    return first, second


def _on_a_rank(rank: int, folder: str, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), Path(folder, f"rank{rank}.pt"))
    if dist.is_initialized():  # `work` may leave by itself
        dist.destroy_process_group()
