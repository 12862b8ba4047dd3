"""The processes of a run: one alone, or several under torchrun with DDP.

The only place besides the command line that reads the environment. A collective is run by every rank or none.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from relora.errors import ConfigError, ReLoRAError
from relora.train.sections import Strategy

Result = TypeVar("Result")

_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process and its peers."""

    rank: int
    world_size: int
    device: torch.device
    patient_group: dist.ProcessGroup | None = None
    """Waits as long as the main process takes, which may read and tokenise for hours."""
    replicas: WeakSet[DistributedDataParallel] = field(default_factory=WeakSet, compare=False)
    """What `wrap_for_training` returned and is still in use."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """How the work is shared, for the summary."""
        return "single" if self.world_size == 1 else "ddp"

    def wrap_for_training(self, model: nn.Module, *, compile_it: bool) -> nn.Module:
        """Return what forward and backward go through; gradients are averaged over ranks in it."""
        wrapped = cast(nn.Module, torch.compile(model)) if compile_it else model
        if self.world_size == 1:
            return wrapped
        devices = [self.device] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(wrapped, device_ids=devices, gradient_as_bucket_view=True)
        # Buffers are constants here; ranks agree on them since construction. (Set afterwards, since torch
        # names the argument differently from version to version.)
        parallel.broadcast_buffers = False
        self.replicas.add(parallel)
        return parallel

    def leave(self) -> None:
        """Leave the group of processes; what was wrapped for training can train no more."""
        if self.world_size == 1:
            return
        # A traceback may hold a replica. Were its reducer the last to hold the group, it would end gloo's
        # threads without giving up Python's lock, which one of them may be waiting for: a hang.
        for replica in self.replicas:
            del replica.reducer, replica.logger
        dist.destroy_process_group()

    def main_first(self, action: Callable[[], Result]) -> Result:
        """Do something on the main process, then on the others, which find its files."""
        results: list[Result] = []
        self.from_main(lambda: results.append(action()))
        return results[0] if self.is_main else action()

    def from_main(self, action: Callable[[], Result]) -> Result:
        """Do something on the main process alone, and hand its result, or its error, to the others."""
        if self.world_size == 1:
            return action()
        outcome: list[Result | ReLoRAError | None] = [None]
        if self.is_main:
            try:
                outcome = [action()]
            except ReLoRAError as error:  # told to all: peers left waiting would die of a broken connection
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self.patient_group)
        if isinstance(outcome[0], ReLoRAError):
            raise outcome[0]
        return cast(Result, outcome[0])

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def agree(
        self, loss: Tensor, norm: Tensor, flags: Sequence[bool]
    ) -> tuple[float, float, tuple[bool, ...]]:
        """Tell every rank the same: one collective, and one wait for the device.

        Args:
            loss: This rank's mean, 0-d.
            norm: The same on every rank, 0-d.
            flags: This rank's.

        Returns:
            The mean loss over ranks, the norm, and which flags are set on any rank.
        """
        values = loss.double()[None]
        if self.world_size > 1:
            raised = torch.tensor([float(flag) for flag in flags], dtype=values.dtype, device=values.device)
            values = self.sum(torch.cat([values, raised]))
        total, *counts, grad_norm = torch.cat([values, norm.double()[None]]).tolist()
        agreed = tuple(count > 0 for count in counts) if self.world_size > 1 else tuple(flags)
        return total / self.world_size, grad_norm, agreed

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def without_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a backward pass leaves gradients local: all but the last micro step."""
        if self.world_size == 1:
            return nullcontext()
        return cast(AbstractContextManager[None], cast(DistributedDataParallel, model).no_sync())


@contextmanager
def processes(strategy: Strategy) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run alone; leave them at the end.

    Raises:
        ConfigError: for a strategy that is not available.
    """
    if strategy == "fsdp":
        raise ConfigError(
            'distributed.strategy "fsdp" is not supported yet: use "ddp", or "auto"; in a loop of your own '
            "ReLoRA takes a model that fully_shard has sharded (docs/method.md)"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    has_cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    patient_group = None
    if world_size > 1:
        dist.init_process_group("nccl" if has_cuda else "gloo")
        patient_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    here = Processes(rank=rank, world_size=world_size, device=device, patient_group=patient_group)
    try:
        yield here
    finally:
        here.leave()
