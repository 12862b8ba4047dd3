"""One optimizer step: micro batches forward and backward, the gradient's norm, the update.

An update from a loss or gradient that is not finite is not made. Ranks decide alike: the loss is summed over
them before the decision, and the gradient whose norm is taken is the same on all. With the flags of pending
requests that sum is the one collective of a step besides the gradients', and reading it the one wait for the
device.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relora.method.seeds import derived_seed
from relora.train.parallel import Processes
from relora.train.phase import Optimizer
from relora.train.precision import Resolved, autocast


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step measured."""

    loss: float
    """Mean loss of the step's tokens over all ranks."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    is_applied: bool
    """Whether the update was made; if not, weights and optimizer are bit for bit as before (a momentum
    of Muon in place or of the complement, which the gradient has gone into, begins anew)."""
    micro_losses: tuple[Tensor, ...]
    """Of this rank's micro batches, on the device."""
    flags: tuple[bool, ...]
    """Which of the flags given are set on any rank."""


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
    after_backward: Callable[[int], None] | None = None,
    flags: Sequence[bool] = (),
) -> StepResult:
    """Take one step on this rank's share of the batch, unless loss or gradient is not finite.

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
        after_backward: Told of the step once its gradients are there; it may change them.
        flags: What this rank wants the others to know.
    """
    model.train()
    torch.manual_seed(derived_seed(seed, "dropout", step, processes.rank))
    rows = batch.chunk(processes.world_size)[processes.rank]
    micro_batches = rows.split(micro_batch_size)
    total = torch.zeros((), device=processes.device)
    micro_losses = []
    optimizer.adamw.zero_grad(set_to_none=True)
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with _sync_on_last(processes, model, is_last=is_last):
            with autocast(precision, processes.device):
                loss: Tensor = model(micro_batch.to(processes.device, non_blocking=True))
            (loss / len(micro_batches)).backward()
        micro_losses.append(loss.detach())
        total += loss.detach() / len(micro_batches)
    if after_backward is not None:
        after_backward(step)
    norm = torch.nn.utils.clip_grad_norm_(
        (p for p in model.parameters() if p.requires_grad), clip_grad_norm or float("inf")
    )
    mean_loss, grad_norm, agreed = processes.agree(total, norm, flags)
    is_finite = math.isfinite(mean_loss) and math.isfinite(grad_norm)
    if is_finite:
        optimizer.adamw.step()
    return StepResult(
        loss=mean_loss,
        grad_norm=grad_norm,
        is_applied=is_finite,
        micro_losses=tuple(micro_losses),
        flags=agreed,
    )


def _sync_on_last(processes: Processes, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:

    return nullcontext() if is_last else processes.without_sync(model)
