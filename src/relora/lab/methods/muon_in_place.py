"""muon-in-place: full rank in 2 bytes a weight, the step on the complement taken on all of the gradient.

Hidden matrices have neither a gradient nor AdamW's moments. Each backward pass of a layer goes at once into a
momentum in bf16, and a step is its orthogonalised part: `residual="muon"` without factors, and so the control
that tells what the factors beside it are worth. Everything else is AdamW's.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from relora.lab.methods.options import InPlaceOptions
from relora.train.groups import PhaseName
from relora.train.in_place_optimizer import InPlaceOptimizer
from relora.train.joint import parts_of
from relora.train.method_parts import choose_targets
from relora.train.phase import Optimizer, beside_adamw, method_config
from relora.train.training_method import TrainingMethod


class MuonInPlace(TrainingMethod):
    """Muon in place on the target layers of the [relora] section, AdamW on everything else."""

    _muon: InPlaceOptimizer
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
            by=lambda groups: InPlaceOptimizer(groups, model, layers, kind="muon", seed=seed),
            adamw_lr=options.adamw_lr,
        )
        (self._muon,) = (part for part in parts_of(optimizer.adamw) if isinstance(part, InPlaceOptimizer))
        self._num_matrices = sum(layer.get_parameter("weight").numel() for layer in layers.values())
        return optimizer

    def step_refused(self, step: int) -> str:
        """Forget the step, and the momenta that it has gone into."""
        return self._muon.refuse(step)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the step."""
        return self._muon.state_of_steps()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a step."""
        self._muon.go_on_from(state)

    @property
    def num_in_place(self) -> int:
        """All weights of the matrices."""
        return self._num_matrices
