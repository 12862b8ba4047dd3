"""full-muon: every weight trains, hidden matrices by Muon and the rest by AdamW.

Muon orthogonalises the momentum of a matrix; with the RMS of its update matched to AdamW's (torch's
"match_rms_adamw", 0.2 sqrt(max(out, in)) times the orthogonal matrix), a learning rate means about the same.
"""

from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import Optimizer as TorchOptimizer

from relora.lab.methods.options import MuonOptions
from relora.train.config import Recipe
from relora.train.groups import Group, PhaseName, rest_groups
from relora.train.joint import Groups, JointOptimizer, matched_muon
from relora.train.method_parts import choose_targets
from relora.train.phase import Optimizer, adamw_of, method_config
from relora.train.training_method import TrainingMethod


class FullMuon(TrainingMethod):
    """Muon on the target layers of the [relora] section, AdamW on everything else."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: Muon's matrices first."""
        del phase
        options = self.recipe.options
        assert isinstance(options, MuonOptions)
        return beside_adamw(
            model,
            self.recipe,
            choose_targets(model, method_config(self.recipe)).layers,
            by=lambda groups: matched_muon(groups, momentum=options.momentum),
            adamw_lr=options.adamw_lr,
        )


def beside_adamw(
    model: nn.Module,
    recipe: Recipe,
    layers: Mapping[str, nn.Module],
    *,
    by: Callable[[Groups], TorchOptimizer],
    adamw_lr: float | None,
) -> Optimizer:
    """Return one optimizer of two: of the weights of some layers at optim.lr, and AdamW of everything else.

    Args:
        model: The model.
        recipe: Of the run.
        layers: Whose weights they are, by name.
        by: Makes the first from its group.
        adamw_lr: Peak of AdamW's rate; None means optim.lr.
    """
    optim = recipe.optim
    hidden = [layer.get_parameter("weight") for layer in layers.values()]
    others = [p for p in model.parameters() if id(p) not in set(map(id, hidden))]
    rest = rest_groups(model, others, optim, lr=optim.lr if adamw_lr is None else adamw_lr)
    first = Group(params=hidden, lr=optim.lr, weight_decay=optim.weight_decay)
    joint = JointOptimizer(
        [
            ([first.options()], by),
            ([group.options() for group in rest], adamw_of(recipe, hidden[0].device)),
        ]
    )
    return Optimizer(adamw=joint, peaks=tuple(group.lr for group in (first, *rest)))
