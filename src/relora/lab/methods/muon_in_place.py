"""muon-in-place: full rank in 2 bytes a weight, the step on the complement taken on all of the gradient.

Hidden matrices have neither a gradient nor AdamW's moments. Each backward pass of a layer goes at once into a
momentum in bf16, and a step is its orthogonalised part: `residual="muon"` without factors, and so the control
that tells what the factors beside it are worth. Everything else is AdamW's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from relora.lab.methods.muon import beside_adamw
from relora.lab.methods.options import InPlaceOptions
from relora.train.groups import PhaseName
from relora.train.joint import parts_of
from relora.train.method_parts import RESIDUALS, InPlace, PlainWeight, RestartReport, choose_targets
from relora.train.phase import Optimizer, method_config
from relora.train.training_method import TrainingMethod

_KIND = "muon"
_STATE = "momentum"


class InPlaceMuon(TorchOptimizer):
    """Moves weights by what their backward passes have left; their momenta are its state.

    Args:
        groups: One, of the layers' weights, with `lr` and `weight_decay`.
        model: The model.
        layers: Plain linear layers of it, by full name.
        seed: Of what is rounded at random.
    """

    def __init__(
        self, groups: list[dict[str, Any]], model: nn.Module, layers: Mapping[str, nn.Module], *, seed: int
    ) -> None:
        super().__init__(groups, {})
        self.steps_done = 0
        self.in_place = InPlace(model, layers, kind=_KIND, momentum=self._momentum, seed=seed)

    def _momentum(self, weight: PlainWeight) -> Tensor:
        state = self.state[weight.weight]
        if not state:
            shape = (weight.out_features, weight.in_features)
            dtype = RESIDUALS[_KIND].dtype(weight.weight.dtype)
            state[_STATE] = torch.zeros(shape, dtype=dtype, device=weight.weight.device)
        momentum: Tensor = state[_STATE]
        return momentum

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight."""
        assert closure is None
        (group,) = self.param_groups
        self.in_place.step_(
            self.steps_done + 1, size=group["lr"], keep=1 - group["lr"] * group["weight_decay"]
        )
        return None


class MuonInPlace(TrainingMethod):
    """Muon in place on the target layers of the [relora] section, AdamW on everything else."""

    _muon: InPlaceMuon
    _num_matrices: int

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: the matrices first."""
        del phase
        options, seed = self.recipe.options, self.recipe.run.seed
        assert isinstance(options, InPlaceOptions)
        layers = choose_targets(model, method_config(self.recipe)).layers
        optimizer = beside_adamw(
            model,
            self.recipe,
            layers,
            by=lambda groups: InPlaceMuon(groups, model, layers, seed=seed),
            adamw_lr=options.adamw_lr,
        )
        (self._muon,) = (part for part in parts_of(optimizer.adamw) if isinstance(part, InPlaceMuon))
        self._num_matrices = sum(layer.get_parameter("weight").numel() for layer in layers.values())
        return optimizer

    def step_refused(self, step: int) -> str:
        """Forget the step, and the momenta that it has gone into."""
        self._muon.in_place.drop(step)
        return "Muon's momenta begin anew"

    def after_step(self, step: int) -> RestartReport | None:
        """Count it: what is rounded at random is a function of the step."""
        self._muon.steps_done = step
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the step."""
        return {"step": self._muon.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a step."""
        self._muon.steps_done = int(state["step"])
        self._muon.in_place.begin(self._muon.steps_done)

    @property
    def num_in_place(self) -> int:
        """All weights of the matrices."""
        return self._num_matrices
