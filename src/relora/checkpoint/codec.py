"""An optimizer's state <-> named tensors and JSON: by full parameter name, bit for bit.

torch's own state_dict goes by position, so that a parameter more or less shifts every state after it, and its
load_state_dict casts states to their parameter's dtype, which rounds fp32 moments of bf16 weights away. Here
each state is found by its parameter's name and keeps its dtype, and a restore happens as a whole or not at
all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from relora.checkpoint.strict_json import listed, shown
from relora.checkpoint.values import decode, dtype_name, encode_items, tensor_keys
from relora.errors import CheckpointError

# What a group holds besides its options: kept as the optimizer has it, in the optimizer's own order.
_STRUCTURE = ("params", "param_names")


@dataclass(frozen=True, kw_only=True)
class OptimizerRestoreReport:
    """What a restore put into an optimizer."""

    num_groups: int
    num_parameters: int
    num_tensors: int
    """State tensors restored, those in options included."""
    without_state: tuple[str, ...]
    """Parameters that had no state when it was saved, and have none now."""


def optimizer_tensors(
    optimizer: Optimizer, names: Mapping[Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's whole state; `restore_optimizer_` puts it back.

    Args:
        optimizer: Of any kind whose state is made of tensors and JSON values (torch's all are).
        names: The full name of each parameter it holds; it may name more.

    Returns:
        Tensors by "<parameter name>/<state name>", which share the optimizer's memory, and a JSON state.

    Raises:
        CheckpointError: naming parameters without a name, and values that cannot be stored.
    """
    named_groups = _named_groups(optimizer, names)
    known: dict[Tensor, str] = {
        parameter: name for group in named_groups for name, parameter in group.items()
    }
    strangers = [key for key in optimizer.state if key not in known]
    if strangers:
        raise CheckpointError(f"the optimizer keeps state for {shown(strangers[0])}, which no group holds")
    tensors: dict[str, Tensor] = {}
    groups = [
        {
            "parameters": list(named),
            "options": encode_items(_options(group), f"param_groups/{index}", tensors),
        }
        for index, (named, group) in enumerate(zip(named_groups, optimizer.param_groups, strict=True))
    ]
    parameters = {name: _likeness(parameter) for parameter, name in known.items()}
    states = {
        known[parameter]: encode_items(values, known[parameter], tensors)
        for parameter, values in optimizer.state.items()
    }
    kind = type(optimizer).__qualname__
    return tensors, {"kind": kind, "groups": groups, "parameters": parameters, "states": states}


@torch.no_grad()
def restore_optimizer_(
    optimizer: Optimizer,
    names: Mapping[Parameter, str],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> OptimizerRestoreReport:
    """Put a saved state into an optimizer, replacing all state it has.

    States go to their parameter's device and keep their dtype; a group's options are set in place, so that
    schedulers which hold the group see them. Options that the saved state does not have stay as they are.

    Args:
        optimizer: Of the kind that was saved, holding parameters of the same names, shapes and dtypes, in
            groups of the same parameters (in any order).
        names: The full name of each parameter it holds; it may name more.
        tensors: As `optimizer_tensors` returned them; they are copied.
        state: As `optimizer_tensors` returned it.

    Returns:
        What was restored.

    Raises:
        CheckpointError: naming what is missing, too much, or different; the optimizer is then unchanged.
    """
    named_groups = _named_groups(optimizer, names)
    _check_form(state)
    held = {name: parameter for group in named_groups for name, parameter in group.items()}
    problems = _differences(optimizer, held, tensors, state)
    saved_options = _matched_options(named_groups, state["groups"])
    if not problems and saved_options is None:
        problems = ["its parameters are divided into other groups"]
    if problems or saved_options is None:
        raise CheckpointError(f"this optimizer state is of another optimizer: {listed(problems)}")
    options = [
        _decoded_options(saved, tensors, group)
        for saved, group in zip(saved_options, optimizer.param_groups, strict=True)
    ]
    flags = {name: group for named, group in zip(named_groups, options, strict=True) for name in named}
    states: dict[Tensor, dict[str, Any]] = {
        held[name]: _decoded_state(held[name], values, tensors, flags[name])
        for name, values in state["states"].items()
    }
    # Nothing below can fail: the optimizer changes as a whole.
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    optimizer.state.clear()
    optimizer.state.update(states)
    return OptimizerRestoreReport(
        num_groups=len(options),
        num_parameters=len(held),
        num_tensors=len(tensors),
        without_state=tuple(name for name in held if name not in state["states"]),
    )


def _named_groups(optimizer: Optimizer, names: Mapping[Parameter, str]) -> list[dict[str, Parameter]]:
    problems = []
    groups: list[dict[str, Parameter]] = []
    taken: set[str] = set()
    for index, group in enumerate(optimizer.param_groups):
        groups.append({})
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is None:
                problems.append(f"a parameter of shape {tuple(parameter.shape)} in group {index} has no name")
            elif name in taken:
                problems.append(f"two parameters are named {name}")
            else:
                taken.add(name)
                groups[-1][name] = parameter
    if problems:
        raise CheckpointError(f"the optimizer's parameters cannot be named: {listed(problems)}")
    return groups


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _STRUCTURE}


def _likeness(parameter: Tensor) -> list[Any]:
    return [list(parameter.shape), dtype_name(parameter)]


def _check_form(state: Mapping[str, Any]) -> None:
    groups, parameters, states = (state.get(key) for key in ("groups", "parameters", "states"))
    well_formed = (
        isinstance(state.get("kind"), str)
        and isinstance(parameters, dict)
        and isinstance(states, dict)
        and all(isinstance(values, dict) for values in states.values())
        and isinstance(groups, list)
        and all(_is_group(group) for group in groups)
    )
    if not well_formed:
        raise CheckpointError("this is not the state of an optimizer: a part of it is missing or malformed")


def _is_group(group: object) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("options"), dict):
        return False
    parameters = group.get("parameters")
    return isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)


def _differences(
    optimizer: Optimizer,
    held: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> list[str]:
    kind, saved = type(optimizer).__qualname__, state["parameters"]
    problems = [] if state["kind"] == kind else [f"it is a {kind}, the state is of {shown(state['kind'])}"]
    problems += [
        f"{shown(name)} is in the checkpoint, but not in the optimizer" for name in saved if name not in held
    ]
    problems += [
        f"{name} is in the optimizer, but not in the checkpoint" for name in held if name not in saved
    ]
    for name, parameter in held.items():
        expected = _likeness(parameter)
        if name in saved and saved[name] != expected:
            problems.append(
                f"{name} is {shown(expected)} in the optimizer and {shown(saved[name])} in the checkpoint"
            )
    problems += [
        f"{shown(name)} has a state, but is no parameter" for name in state["states"] if name not in saved
    ]
    used = tensor_keys(state["states"]) | tensor_keys([group["options"] for group in state["groups"]])
    return problems + [f"nothing refers to the tensor {shown(key)}" for key in tensors if key not in used]


def _matched_options(
    named_groups: list[dict[str, Parameter]], saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """Return for each group the options of the saved one with its parameters; None if they do not pair up."""
    left = list(saved_groups)
    options = []
    for named in named_groups:
        same = next((saved for saved in left if set(saved["parameters"]) == set(named)), None)
        if same is None:
            return None
        left.remove(same)
        options.append(same["options"])
    return None if left else options


def _decoded_options(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], group: Mapping[str, Any]
) -> dict[str, Any]:
    decoded = {}
    for key, value in _options(options).items():
        now = group.get(key)
        # A learning rate may be a tensor, on the device that the step runs on.
        device = now.device if isinstance(now, Tensor) else torch.device("cpu")
        decoded[key] = decode(value, tensors, partial(_copied, device=device))
    return decoded


def _decoded_state(
    parameter: Parameter, values: Mapping[str, Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    # As torch places them: step counts stay on the CPU unless the step itself reads them on the device.
    step_device = (
        parameter.device if options.get("fused") or options.get("capturable") else torch.device("cpu")
    )

    def beside_parameter(tensor: Tensor) -> Tensor:
        if tensor.shape == parameter.shape:
            # In the parameter's memory layout, as optimizers make states: matrix products round by it.
            return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        return _copied(tensor, device=parameter.device)

    return {
        key: decode(
            value, tensors, partial(_copied, device=step_device) if key == "step" else beside_parameter
        )
        for key, value in values.items()
    }


def _copied(tensor: Tensor, *, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True)
