"""Everything a run is at a step boundary, and how it goes into a checkpoint and comes back.

Weights, factors and residuals are in the model's state dict, moments in the optimizer's; the rest counts.
"""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import relora
from relora.checkpoint.codec import optimizer_tensors, restore_optimizer_
from relora.checkpoint.rng import capture_rng, restore_rng_
from relora.checkpoint.store import LoadedCheckpoint, save_checkpoint
from relora.errors import CheckpointError
from relora.train.phase import Optimizer, PhaseName
from relora.train.training_method import TrainingMethod


@dataclass(kw_only=True)
class Progress:
    """The counters of a run; JSON values only."""

    step: int = 0
    tokens: int = 0
    restarts: int = 0
    wall_s: float = 0.0
    """Seconds in the training loop, summed over resumptions."""
    loss_sum: float = 0.0
    """Sum of the steps' losses since the last line of metrics.jsonl."""
    loss_steps: int = 0
    peak_memory_bytes: int = 0
    """Most memory used up to the last checkpoint, in this process or those before it."""
    switch: dict[str, float] | None = None
    """Step and held-out figures at the switch."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""


@dataclass(kw_only=True)
class RunState:
    """What training changes."""

    model: nn.Module
    """The model itself, never a wrapper around it."""
    optimizer: Optimizer
    method: TrainingMethod
    phase: PhaseName
    progress: Progress


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "relora": relora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def save_state(root: Path, state: RunState, *, precision: str, fingerprint: str) -> Path:
    """Write a checkpoint of the step that was just finished.

    Args:
        root: The folder of the run's checkpoints.
        state: The run.
        precision: The precision in force, which a resumed run keeps.
        fingerprint: Of the prepared data.

    Raises:
        CheckpointError: if it cannot be written.
    """
    optimizer, optimizer_state = optimizer_tensors(state.optimizer.adamw, _names(state.model))
    rng, rng_state = capture_rng()
    return save_checkpoint(
        root,
        step=state.progress.step,
        tensors={"model": state.model.state_dict(), "optimizer": optimizer, "rng": rng},
        state={
            "phase": state.phase,
            "precision": precision,
            "fingerprint": fingerprint,
            "progress": vars(state.progress),
            "method": state.method.state_dict(),
            "optimizer": optimizer_state,
            "rng": rng_state,
        },
        description={
            "phase": state.phase,
            "restart_index": state.progress.restarts,
            "data_fingerprint": fingerprint,
            "versions": versions(),
        },
    )


def restore_state_(state: RunState, checkpoint: LoadedCheckpoint, *, fingerprint: str) -> None:
    """Put a checkpoint into a run that was built for its phase.

    Raises:
        CheckpointError: if it does not fit the model, the optimizer or the data.
    """
    saved: dict[str, Any] = checkpoint.state
    if saved["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"the data of this run has changed since step {checkpoint.step} (then "
            f"{saved['fingerprint']}, now {fingerprint}): put it back, or begin a new run with --run.name"
        )
    if "method" not in saved:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was written by an earlier version of relora, which "
            "kept the method's state in another form: go on with that version, or begin a new run"
        )
    try:
        state.model.load_state_dict(checkpoint.tensors["model"])
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model of this recipe: {error}") from error
    options = [dict(group, params=None) for group in state.optimizer.adamw.param_groups]
    restore_optimizer_(
        state.optimizer.adamw, _names(state.model), checkpoint.tensors["optimizer"], saved["optimizer"]
    )
    # The recipe's hyperparameters are in force, also where a fork has changed them.
    for group, wanted in zip(state.optimizer.adamw.param_groups, options, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    if saved["method"] is not None:
        state.method.load_state_dict(saved["method"])
    restore_rng_(checkpoint.tensors["rng"], saved["rng"])
    state.progress = Progress(**saved["progress"])


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
