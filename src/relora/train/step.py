"""One optimizer step: micro batches forward and backward, the gradient's norm, the update."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.errors import NonFiniteError
from relora.method.seeds import derived_seed
from relora.train.parallel import Processes
from relora.train.phase import Optimizer
from relora.train.precision import Resolved, autocast


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step measured; tensors, so that only logging waits for the device."""

    loss: Tensor
    """Mean loss of the step's tokens on this rank, float32, 0-d."""
    grad_norm: Tensor
    """Norm of the whole gradient before clipping, 0-d."""


def train_step_(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Tensor,
    processes: Processes,
    *,
    step: int,
    seed: int,
    micro_batch_size: int,
    precision: Resolved,
    clip_grad_norm: float,
) -> StepResult:
    """Take one step on this rank's share of the batch.

    Args:
        model: A `TokenLoss`, as `Processes.wrap_for_training` returned it.
        optimizer: With the step's learning rates set.
        batch: (batch_size, seq_len) token ids, the same on every rank; each takes its rows.
        processes: This rank among its peers.
        step: Counted from 1; with `seed` it determines dropout.
        seed: The run's.
        micro_batch_size: Rows that run at once.
        precision: Of the matrix products.
        clip_grad_norm: Largest norm of the gradient; 0 does not clip.

    Raises:
        NonFiniteError: if loss or gradient is not finite; weights and optimizer are then unchanged.
    """
    model.train()
    torch.manual_seed(derived_seed(seed, "dropout", step, processes.rank))
    rows = batch.chunk(processes.world_size)[processes.rank]
    micro_batches = rows.split(micro_batch_size)
    total = torch.zeros((), device=processes.device)
    optimizer.adamw.zero_grad(set_to_none=True)
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with _sync_on_last(processes, model, is_last=is_last):
            with autocast(precision, processes.device):
                loss: Tensor = model(micro_batch.to(processes.device, non_blocking=True))
            (loss / len(micro_batches)).backward()
        total += loss.detach() / len(micro_batches)
    norm = torch.nn.utils.clip_grad_norm_(
        (p for p in model.parameters() if p.requires_grad), clip_grad_norm or float("inf")
    )
    if not bool(torch.isfinite(norm)):
        raise NonFiniteError(
            f"step {step}: loss {float(total):g}, gradient norm {float(norm):g}; no weight was changed. "
            "Lower the learning rate, or lengthen the warm-up; the same command resumes the last checkpoint"
        )
    optimizer.adamw.step()
    return StepResult(loss=total, grad_norm=norm)


def _sync_on_last(processes: Processes, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:

    return nullcontext() if is_last else processes.without_sync(model)
