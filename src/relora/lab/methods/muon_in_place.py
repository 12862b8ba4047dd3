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
from relora.train.in_place_optimizer import InPlaceOptimizer, in_place_beside_adamw
from relora.train.phase import Optimizer, num_in_place
from relora.train.training_method import TrainingMethod


class MuonInPlace(TrainingMethod):
    """Muon in place on the target layers of the [relora] section, AdamW on everything else."""

    _muon: InPlaceOptimizer

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: the matrices first."""
        del phase
        options = self.recipe.options
        assert isinstance(options, InPlaceOptions)
        optimizer, self._muon = in_place_beside_adamw(
            model, self.recipe, kind="muon", adamw_lr=options.adamw_lr
        )
        return optimizer

    def step_refused(self, step: int) -> str:
        """Forget the step, and the momenta that it has gone into."""
        return self._muon.refuse(step)

    def state_dict(self) -> dict[str, Any]:
        """Return the step."""
        return self._muon.state_of_steps()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a step."""
        self._muon.go_on_from(state)

    @property
    def num_in_place(self) -> int:
        """All weights of the matrices."""
        return num_in_place(self._muon)
