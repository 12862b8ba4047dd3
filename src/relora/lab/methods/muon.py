"""full-muon: every weight trains, hidden matrices by Muon and the rest by AdamW.

Muon orthogonalises the momentum of a matrix; with the RMS of its update matched to AdamW's (torch's
"match_rms_adamw", 0.2 sqrt(max(out, in)) times the orthogonal matrix), a learning rate means about the same.
"""

from torch import nn

from relora.lab.methods.options import MuonOptions
from relora.train.groups import Group, PhaseName, rest_groups
from relora.train.joint import JointOptimizer, matched_muon
from relora.train.method_parts import choose_targets
from relora.train.phase import Optimizer, adamw_of, method_config
from relora.train.training_method import TrainingMethod


class FullMuon(TrainingMethod):
    """Muon on the target layers of the [relora] section, AdamW on everything else."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: Muon's matrices first."""
        del phase
        options, optim = self.recipe.options, self.recipe.optim
        assert isinstance(options, MuonOptions)
        layers = choose_targets(model, method_config(self.recipe)).layers.values()
        hidden = [layer.get_parameter("weight") for layer in layers]
        others = [p for p in model.parameters() if id(p) not in set(map(id, hidden))]
        rest_lr = optim.lr if options.adamw_lr is None else options.adamw_lr
        rest = rest_groups(model, others, optim, lr=rest_lr)
        first = Group(params=hidden, lr=optim.lr, weight_decay=optim.weight_decay)
        joint = JointOptimizer(
            [
                ([first.options()], lambda groups: matched_muon(groups, momentum=options.momentum)),
                ([group.options() for group in rest], adamw_of(self.recipe, hidden[0].device)),
            ]
        )
        return Optimizer(adamw=joint, peaks=tuple(group.lr for group in (first, *rest)))
