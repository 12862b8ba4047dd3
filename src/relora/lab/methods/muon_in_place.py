"""muon-in-place: full rank in 2 bytes a weight, the step on the complement taken on all of the gradient.

Hidden matrices have neither a gradient nor AdamW's moments. Each backward pass of a layer goes at once into a
momentum in bf16, and a step is its orthogonalised part: `residual="muon"` without factors, and so the control
that tells what the factors beside it are worth. Everything else is AdamW's.
"""

from torch import nn

from relora.lab.methods.options import InPlaceOptions
from relora.train.groups import PhaseName
from relora.train.in_place_optimizer import in_place_beside_adamw
from relora.train.phase import Optimizer
from relora.train.training_method import SteppedInPlace


class MuonInPlace(SteppedInPlace):
    """Muon in place on the target layers of the [relora] section, AdamW on everything else."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: the matrices first."""
        del phase
        options = self.recipe.options
        assert isinstance(options, InPlaceOptions)
        optimizer, self.in_place = in_place_beside_adamw(
            model, self.recipe, kind="muon", adamw_lr=options.adamw_lr
        )
        return optimizer
