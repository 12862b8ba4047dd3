"""Steps in place, without a gradient of the weight, as a torch optimizer with a group and states."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from relora.method.complement_report import ComplementReport
from relora.method.in_place import InPlace, PlainWeight
from relora.method.residuals import RESIDUALS
from relora.method.targets import choose_targets
from relora.train.config import Recipe
from relora.train.joint import parts_of
from relora.train.phase import Optimizer, beside_adamw, method_config

_STATE = "momentum"


class InPlaceOptimizer(TorchOptimizer):
    """Moves weights by what their backward passes have left; momenta, where the kind has them, are its state.

    Args:
        groups: One, of the layers' weights, with `lr` and `weight_decay`.
        model: The model, not compiled and without a wrapper.
        layers: Plain linear layers of it, by full name, in the order of the group.
        kind: One of RESIDUALS.
        seed: Of what is rounded at random, with the step and the layer's name.

    Raises:
        ConfigError: as `InPlace`.

    Attributes:
        report: What the last step did; None before the first.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        kind: str,
        seed: int,
    ) -> None:
        super().__init__(groups, {})
        self._residual = RESIDUALS[kind]
        self._steps_done = 0
        self.report: ComplementReport | None = None
        self._in_place = InPlace(
            model, layers, kind=kind, momentum=self._momentum if self.keeps_momentum else None, seed=seed
        )

    @property
    def keeps_momentum(self) -> bool:
        """Whether anything lasts from step to step."""
        return self._residual.keeps_momentum

    def _momentum(self, weight: PlainWeight) -> Tensor:
        state = self.state[weight.weight]
        if not state:
            shape = (weight.out_features, weight.in_features)
            dtype = self._residual.dtype(weight.weight.dtype)
            state[_STATE] = torch.zeros(shape, dtype=dtype, device=weight.weight.device)
        momentum: Tensor = state[_STATE]
        return momentum

    def hold_(self) -> None:
        """Make momenta, or what a step's passes add up in, before the first pass does."""
        self._in_place.hold_()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight.

        Raises:
            ConfigError: if no backward pass went through any layer.
        """
        assert closure is None
        (group,) = self.param_groups
        keep = 1 - group["lr"] * group["weight_decay"]
        self.report = self._in_place.step_(self._steps_done + 1, size=group["lr"], keep=keep)
        self._steps_done += 1
        return None

    def refuse(self, step: int) -> str:
        """Forget a step not taken, and momenta that it has gone into; return in words what that costs."""
        self._in_place.drop(step)
        self._steps_done = step
        return "Muon's momenta begin anew" if self.keeps_momentum else ""

    def state_of_steps(self) -> dict[str, int]:
        """Return what a checkpoint keeps beside momenta: what is rounded at random depends on the step."""
        return {"step": self._steps_done}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_of_steps` returned."""
        self._steps_done = int(state["step"])
        self._in_place.begin(self._steps_done)

    def release_(self) -> None:
        """Give the weights back to autograd, and forget them."""
        self._in_place.release_()


def in_place_beside_adamw(
    model: nn.Module, recipe: Recipe, *, kind: str, scale: float = 1.0, adamw_lr: float | None = None
) -> tuple[Optimizer, InPlaceOptimizer]:
    """Return the optimizer of a full-rank phase whose target layers step in place, and its part that does.

    Args:
        model: The plain model.
        recipe: Of the run.
        kind: One of RESIDUALS.
        scale: As for `beside_adamw`.
        adamw_lr: As for `beside_adamw`.

    Raises:
        ConfigError: as `choose_targets`, `beside_adamw` and `InPlace`.
    """
    layers = choose_targets(model, method_config(recipe)).layers
    optimizer = beside_adamw(
        model,
        recipe,
        layers,
        by=lambda groups: InPlaceOptimizer(groups, model, layers, kind=kind, seed=recipe.run.seed),
        scale=scale,
        adamw_lr=adamw_lr,
    )
    (part,) = (part for part in parts_of(optimizer.adamw) if isinstance(part, InPlaceOptimizer))
    return optimizer, part
