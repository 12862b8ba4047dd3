"""Clear the optimizer's memory of factors that a restart has replaced (paper section 2, appendix A).

The moments of the old factors would steer the new ones back into the old subspace. "zero" clears all of
them; "magnitude" and "random" clear exactly round(ratio * numel) entries of each tensor, chosen by rank
order, so that neither a constant tensor, nor bf16, nor a tensor of any size changes the count. Whatever is
cleared is read back and compared: a reset that did not happen raises.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.errors import ConfigError, NonFiniteError, OptimizerResetError
from relora.method.adapters import OptimizerAdapter, adapter_for, holds_values
from relora.method.config import ResetMask, ResetMethod
from relora.method.seeds import derived_generator


@dataclass(frozen=True, kw_only=True)
class ParameterReset:
    """What a reset did to the state of one parameter."""

    name: str
    num_states: int
    """State tensors touched."""
    entries: int
    """Entries in those tensors."""
    entries_targeted: int
    entries_zeroed: int
    """Targeted entries that read 0 afterwards; equal to `entries_targeted`, or the reset has raised."""
    entries_carried: int = 0
    """Entries rewritten in the coordinates of the new factors by "transport"."""


@dataclass(frozen=True, kw_only=True)
class ResetReport:
    """What a reset did, by parameter and in total."""

    method: ResetMethod
    parameters: tuple[ParameterReset, ...]
    """One for each parameter that has state."""
    without_state: tuple[str, ...]
    """Parameters the optimizer has not stepped yet, such as the factors of an unrouted expert."""
    step_counts_reset: int

    @property
    def num_states(self) -> int:
        """State tensors touched."""
        return sum(parameter.num_states for parameter in self.parameters)

    @property
    def entries_targeted(self) -> int:
        """Entries that were to be zeroed."""
        return sum(parameter.entries_targeted for parameter in self.parameters)

    @property
    def entries_zeroed(self) -> int:
        """Targeted entries that are zero now."""
        return sum(parameter.entries_zeroed for parameter in self.parameters)

    @property
    def entries_carried(self) -> int:
        """Entries that "transport" rewrote."""
        return sum(parameter.entries_carried for parameter in self.parameters)

    @property
    def zeroed_fraction(self) -> float:
        """Zeroed entries over all entries of the touched states; 0 if there are none."""
        entries = sum(parameter.entries for parameter in self.parameters)
        return self.entries_zeroed / entries if entries else 0.0


def reset_optimizer_state_(
    optimizer: Optimizer,
    params: Iterable[nn.Parameter | tuple[str, nn.Parameter]],
    *,
    method: ResetMethod,
    ratio: float = 0.99,
    mask: ResetMask = "coupled",
    seed: int = 0,
    reset_step_count: bool = False,
) -> ResetReport:
    """Clear the optimizer state of some parameters in place; every other state stays bit-identical.

    Args:
        optimizer: Any optimizer with an adapter (`relora.method.adapters`).
        params: Parameters, or (name, parameter) pairs as `lora_parameters` yields them; names appear in the
            report and seed "random".
        method: "zero", "random", "magnitude" (the smallest go), or "none".
        ratio: Fraction zeroed by "random" and "magnitude": round(ratio * numel) entries of each tensor.
        mask: "coupled" prunes all moments of a parameter by one mask, from the first moment's magnitude;
            "separate" by one mask each.
        seed: Root of the masks of "random".
        reset_step_count: Also set the parameters' step counts to 0, which restores bias correction. Without
            it, Adam's first updates after a full reset overshoot: 6.57 times the learning rate at step 12
            for betas (0.9, 0.999) and a constant gradient.

    Raises:
        ConfigError: for an unknown optimizer family or state, a parameter that is not the optimizer's, or
            a method, ratio or mask out of range.
        NonFiniteError: if a state holds NaN or infinity; nothing has changed then.
        OptimizerResetError: if the state does not read as it should afterwards, or nothing was touched
            although the optimizer has states.
    """
    if violations := _violations(method, ratio, mask):
        raise ConfigError.from_violations("optimizer reset", violations)
    named = _named(params)
    check_resettable(optimizer, named, method=method)
    with_state = [(name, parameter) for name, parameter in named if optimizer.state.get(parameter)]
    choose = RESET_METHODS[method]
    resets = []
    for name, parameter in with_state:
        generator = derived_generator(seed, name, "optimizer reset")
        resets.append(_reset_parameter_(optimizer, parameter, name, choose, ratio, mask, generator))
    counts = sum(_reset_step_(optimizer, p, name) for name, p in with_state) if reset_step_count else 0
    return ResetReport(
        method=method,
        parameters=tuple(resets),
        without_state=tuple(name for name, p in named if not optimizer.state.get(p)),
        step_counts_reset=counts,
    )


def check_resettable(
    optimizer: Optimizer, params: Iterable[nn.Parameter | tuple[str, nn.Parameter]], *, method: ResetMethod
) -> None:
    """Refuse, before anything changes, what a reset could not do.

    Raises:
        ConfigError: for an unknown optimizer family or state, or parameters that are not the optimizer's.
        NonFiniteError: if a state holds NaN or infinity.
        OptimizerResetError: if nothing would be touched although the optimizer has states.
    """
    adapter = adapter_for(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = _named(params)
    # A frozen lora_A has no state to reset, and no place in an optimizer.
    strangers = [name for name, p in named if p.requires_grad and id(p) not in held]
    if strangers:
        raise ConfigError(
            f"{type(optimizer).__name__} does not hold {_shorten(strangers)}: build the optimizer after "
            "inject(model, config), from the parameters that require gradients"
        )
    held_moments = 0
    for name, parameter in named:
        state = optimizer.state.get(parameter, {})
        for moment in adapter.held_moments(state):
            held_moments += 1
            if not adapter.read(state, moment).isfinite().all():
                raise NonFiniteError(
                    f"optimizer state {moment!r} of {name} holds NaN or infinity: go back to the last good "
                    "checkpoint, and lower the learning rate or clip gradients"
                )
            if obstacle := adapter.obstacle(state, moment, method):
                raise ConfigError(f"optimizer reset {method!r} of {moment!r} of {name}: {obstacle}")
    has_states = any(map(holds_values, optimizer.state.values()))
    if method != "none" and not held_moments and has_states:
        raise OptimizerResetError(
            f"optimizer reset {method!r} would touch no state of {len(named)} parameters although "
            f"{type(optimizer).__name__} has states: no gradient has reached these parameters, or there are "
            "none (an iterator that was used up before?)"
        )


def _reset_parameter_(  # noqa: PLR0917
    optimizer: Optimizer,
    parameter: Tensor,
    name: str,
    choose: "Choose",
    ratio: float,
    mask: ResetMask,
    generator: torch.Generator,
) -> ParameterReset:
    adapter = adapter_for(optimizer)
    moments = adapter.held_moments(optimizer.state[parameter])
    entries = targeted = zeroed = touched = 0
    shared: Tensor | None = None
    for moment in moments:
        values = adapter.read(optimizer.state[parameter], moment)
        if mask == "separate" or shared is None or shared.shape != values.shape:
            chosen = choose(values, ratio, generator)
            if chosen is None:
                break
            shared = chosen
        expected = values.masked_fill(shared, 0)
        adapter.clear_(optimizer.state[parameter], moment, shared)
        # Asked for again, since a wrapper's `state` may be a copy that clearing leaves no trace in.
        after = adapter.read(optimizer.state[parameter], moment)
        if not torch.equal(after, expected):
            raise OptimizerResetError(
                f"optimizer reset of {moment!r} of {name}: of {int(shared.sum())} targeted entries "
                f"{int((after[shared] == 0).sum())} are 0 and {int((after != expected).sum())} entries are "
                f"not what they should be: {_broken(adapter)}"
            )
        touched += 1
        entries += values.numel()
        targeted += int(shared.sum())
        zeroed += int((after[shared] == 0).sum())
    return ParameterReset(
        name=name, num_states=touched, entries=entries, entries_targeted=targeted, entries_zeroed=zeroed
    )


def _reset_step_(optimizer: Optimizer, parameter: Tensor, name: str) -> bool:
    adapter = adapter_for(optimizer)
    was_reset = adapter.reset_step_(optimizer.state[parameter])
    count = float(optimizer.state[parameter].get(adapter.step, 0))
    if count:
        raise OptimizerResetError(
            f"the step count of {name} is {count:g} after its reset: {_broken(adapter)}"
        )
    return was_reset


def _broken(adapter: OptimizerAdapter) -> str:
    return (
        f"{type(adapter).__name__} for {adapter.optimizer.__name__} is broken, or the optimizer hands out "
        "copies of its states"
    )


Choose = Callable[[Tensor, float, torch.Generator], Tensor | None]


def _everything(values: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    del ratio, generator
    return torch.ones_like(values, dtype=torch.bool)


def _smallest(values: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    del generator
    return lowest(values.abs(), round(ratio * values.numel()))


def _at_random(values: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU in float64, so that every device and rank agrees and ties do not happen.
    scores = torch.rand(values.shape, dtype=torch.float64, generator=generator, device="cpu")
    return lowest(scores, round(ratio * values.numel())).to(values.device)


def _nothing(values: Tensor, ratio: float, generator: torch.Generator) -> None:
    del values, ratio, generator


RESET_METHODS: dict[str, Choose] = {
    "zero": _everything,
    "random": _at_random,
    "magnitude": _smallest,
    "none": _nothing,
}


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of exactly the `count` smallest scores; among equals the first by index.

    Args:
        scores: Finite values of any shape and floating dtype.
        count: How many, from 0 to numel.

    Returns:
        bool tensor of the same shape.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count:
        flat = scores.reshape(-1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        # Not kthvalue, which torch.use_deterministic_algorithms refuses on CUDA.
        threshold = flat.topk(count, largest=False, sorted=False).values.max()
        torch.less(flat, threshold, out=mask)
        ties = (flat == threshold).nonzero().squeeze(1)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)


def _violations(method: object, ratio: object, mask: object) -> list[str]:
    violations = []
    if method not in RESET_METHODS:
        violations.append(f"method must be one of {', '.join(RESET_METHODS)}, not {method!r}")
    if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        violations.append(f"ratio must be within 0 to 1, not {ratio!r}")
    if mask not in get_args(ResetMask):
        violations.append(f"mask must be one of {', '.join(get_args(ResetMask))}, not {mask!r}")
    return violations


def _named(params: Iterable[nn.Parameter | tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Name the parameters that come without a name, each once, however often it is given."""
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for index, item in enumerate(params):
        name, value = item if isinstance(item, tuple) and len(item) == 2 else (f"parameter {index}", item)
        if not isinstance(value, Tensor) or isinstance(params, Tensor):
            raise ConfigError(
                "optimizer reset: params must be an iterable of parameters or (name, parameter) pairs, such "
                f"as lora_parameters(model), not a {type(params).__name__} of {type(item).__name__}"
            )
        named.setdefault(id(value), (name, value))
    return list(named.values())


def _shorten(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
