"""Everything a run is at a step boundary, and how it goes into a checkpoint and comes back.

Weights, factors and residuals are in the model's state dict, moments in the optimizer's; the rest counts.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import relora
from relora.checkpoint.codec import optimizer_tensors, restore_optimizer_
from relora.checkpoint.rng import capture_rng, restore_rng_
from relora.checkpoint.store import LoadedCheckpoint
from relora.checkpoint.strict_json import listed, shown
from relora.checkpoint.values import decode, encode
from relora.errors import CheckpointError, NonFiniteError
from relora.train.groups import PhaseName
from relora.train.phase import Optimizer, momenta
from relora.train.precision import Resolved
from relora.train.training_method import TrainingMethod
from relora.train.watch import RestartWatch

_GROUPS = ("model", "optimizer", "rng")
_KINDS: dict[str, tuple[type, ...]] = {
    "phase": (str,),
    "precision": (str,),
    "fingerprint": (str,),
    "recipe": (dict,),
    "progress": (dict,),
    "method": (dict, type(None)),
    "watch": (dict,),
    "optimizer": (dict,),
    "rng": (dict,),
}


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
    logged_step: int = 0
    """The step of the last line of metrics.jsonl."""
    passed_batches: int = 0
    """Batches of the data that were passed over in going back; step s takes batch s + passed_batches."""
    nonfinite_in_row: int = 0
    """Steps in a row, up to the last one, that were not finite."""
    nonfinite_events: int = 0
    """Lines of nonfinite.jsonl."""
    switch: dict[str, float] | None = None
    """Step and held-out figures at the switch."""
    warm_start_means: list[float] = field(default_factory=list)
    """Mean losses by window of a warm start that its loss may end."""
    warm_start_pending: list[float] = field(default_factory=list)
    """Losses of the window that is open."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""

    def as_json(self) -> dict[str, Any]:
        """Return the counters as JSON, figures that are not finite included."""
        encoded: dict[str, Any] = encode(vars(self), "progress", {})
        return encoded

    @classmethod
    def from_json(cls, encoded: Mapping[str, Any]) -> "Progress":
        """Return the counters that `as_json` gave; those of an older version take their defaults.

        Raises:
            CheckpointError: if they are something else.
        """
        values = decode(encoded, {}, lambda tensor: tensor)
        if not isinstance(values, dict):
            raise CheckpointError(f"progress should be an object, found {shown(encoded)}")
        known = {each.name: type(getattr(cls(), each.name)) for each in fields(cls)}
        unfit = [name for name, value in values.items() if not _fits(known.get(name), value)]
        if unfit or "step" not in values:
            raise CheckpointError(f"progress is malformed, or of a newer version: {listed(unfit)}")
        return cls(**values)


@dataclass(kw_only=True)
class RunState:
    """What training changes."""

    model: nn.Module
    """The model itself, never a wrapper around it."""
    optimizer: Optimizer
    method: TrainingMethod
    phase: PhaseName
    progress: Progress
    watch: RestartWatch
    device: torch.device
    """Where it trains; a run that starts cold has its model there from the switch on."""

    def check_finite(self) -> None:
        """Refuse what no run could go on from.

        Raises:
            NonFiniteError: naming weights and optimizer states that are not finite.
        """
        parameters = dict(self.model.named_parameters())
        suspects = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in self.optimizer.adamw.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    suspects[f"{name}/{key}"] = value
        suspects |= momenta(self.model)
        # One wait for the device, not one for each tensor: each answers on the device first.
        device = next(iter(parameters.values())).device
        finite = torch.stack([tensor.isfinite().all().to(device) for tensor in suspects.values()]).tolist()
        if not all(finite):
            broken = [name for name, fine in zip(suspects, finite, strict=True) if not fine]
            raise NonFiniteError(
                f"the checkpoint of step {self.progress.step} is not written, as {listed(broken, most=3)} "
                "would not be finite in it; the one before is intact."
            )


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """The JSON part of a checkpoint of a run, checked before anything is built from it."""

    phase: PhaseName
    precision: Resolved
    fingerprint: str
    """Of the prepared data."""
    recipe: dict[str, Any]
    """The settings that decide what the run computes, by "section.field"."""
    progress: Progress
    method: dict[str, Any] | None
    """What the method remembers, such as restart counters."""
    watch: dict[str, Any]
    optimizer: dict[str, Any]
    rng: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: LoadedCheckpoint) -> "SavedState":
        """Read the state of a checkpoint.

        Raises:
            CheckpointError: naming what is missing, malformed or contradicts the rest.
        """
        state = checkpoint.state
        problems = [f"{name} is missing or malformed" for name in _KINDS if not _is_kind(state, name)]
        problems += [f"{shown(name)} is not known" for name in state if name not in _KINDS]
        problems += [f"{name}.safetensors is missing" for name in _GROUPS if name not in checkpoint.tensors]
        if not problems:
            problems += _contradictions(checkpoint)
        if problems:
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} is not one of a run: {listed(problems)}"
            )
        return cls(**{**state, "progress": Progress.from_json(state["progress"])})


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "relora": relora.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def checkpoint_content(
    state: RunState, *, precision: Resolved, fingerprint: str, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the checkpoint of the step that was just finished, as `save_checkpoint` takes it.

    Args:
        state: The run; the tensors returned share its memory.
        precision: The precision in force, which a resumed run keeps.
        fingerprint: Of the prepared data.
        recipe: The settings that decide what the run computes.

    Raises:
        CheckpointError: if a part of it cannot be stored.
    """
    optimizer, optimizer_state = optimizer_tensors(state.optimizer.adamw, _names(state.model))
    rng, rng_state = capture_rng()
    return {
        "step": state.progress.step,
        "tensors": {"model": state.model.state_dict(), "optimizer": optimizer, "rng": rng},
        "state": {
            "phase": state.phase,
            "precision": precision,
            "fingerprint": fingerprint,
            "recipe": dict(recipe),
            "progress": state.progress.as_json(),
            "method": state.method.state_dict(),
            "watch": state.watch.state_dict(),
            "optimizer": optimizer_state,
            "rng": rng_state,
        },
        "description": {
            "phase": state.phase,
            "restart_index": state.progress.restarts,
            "recipe_sha256": settings_digest(recipe),
            "data_fingerprint": fingerprint,
            "versions": versions(),
        },
    }


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of settings, whatever their order."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


def load_weights_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved weights into a model of their shape.

    Raises:
        CheckpointError: if they do not fit.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model of this recipe: {error}") from error


def restore_state_(
    state: RunState, checkpoint: LoadedCheckpoint, saved: SavedState, *, fingerprint: str
) -> None:
    """Put a checkpoint into a run that was built for its phase.

    Raises:
        CheckpointError: if it does not fit the model, the optimizer or the data.
    """
    if saved.fingerprint != fingerprint:
        raise CheckpointError(
            f"the data of this run has changed since step {checkpoint.step} (then "
            f"{saved.fingerprint}, now {fingerprint}): put it back, or begin a new run with --run.name"
        )
    load_weights_(state.model, checkpoint.tensors["model"])
    options = [dict(group, params=None) for group in state.optimizer.adamw.param_groups]
    restore_optimizer_(
        state.optimizer.adamw, _names(state.model), checkpoint.tensors["optimizer"], saved.optimizer
    )
    # The recipe's hyperparameters are in force, also where a fork has changed them.
    for group, wanted in zip(state.optimizer.adamw.param_groups, options, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    if (saved.method is None) != (state.method.state_dict() is None):
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} has {'no' if saved.method is None else 'a'} method "
            "state, which run.method of this recipe does not fit"
        )
    if saved.method is not None:
        state.method.load_state_dict(saved.method)
    state.watch.load_state_dict(saved.watch)
    restore_rng_(checkpoint.tensors["rng"], saved.rng)
    state.progress = saved.progress


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _is_kind(state: Mapping[str, Any], name: str) -> bool:
    return name in state and isinstance(state[name], _KINDS[name])


def _contradictions(checkpoint: LoadedCheckpoint) -> list[str]:
    """Compare what the parts of a well-formed checkpoint say of the same things."""
    state, step = checkpoint.state, checkpoint.step
    progress = Progress.from_json(state["progress"])
    # Restart counters, where the method is one that counts them by these names.
    method = {"step": step, "restart_index": progress.restarts, **(state["method"] or {})}
    said = {
        "phase": (state["phase"] in ("full", "warm_start", "low_rank"), state["phase"]),
        "precision": (state["precision"] in ("fp32", "bf16"), state["precision"]),
        "progress.step": (progress.step == step, progress.step),
        "method.step": (method["step"] == step, method["step"]),
        "method.restart_index": (method["restart_index"] == progress.restarts, method["restart_index"]),
    }
    return [f"{name} is {shown(value)}" for name, (fits, value) in said.items() if not fits]


def _fits(kind: type | None, value: object) -> bool:
    if kind in (int, float):
        return type(value) is kind and (kind is float or value >= 0)
    figures = value if isinstance(value, dict) else {}
    sound = all(type(figure) in (int, float) for figure in figures.values())
    if kind is list:
        return isinstance(value, list) and all(type(figure) is float for figure in value)
    if kind is dict:
        return isinstance(value, dict) and sound
    return kind is type(None) and (value is None or isinstance(value, dict)) and sound
