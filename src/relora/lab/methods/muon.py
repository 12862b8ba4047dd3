"""full-muon: every weight trains, hidden matrices by Muon and the rest by AdamW.

Muon orthogonalises the momentum of a matrix; with the RMS of its update matched to AdamW's (torch's
"match_rms_adamw", 0.2 sqrt(max(out, in)) times the orthogonal matrix), a learning rate means about the same.
"""

from torch import nn

from relora.lab.methods.options import MuonOptions
from relora.train.groups import PhaseName
from relora.train.joint import matched_muon
from relora.train.method_parts import choose_targets
from relora.train.phase import Optimizer, beside_adamw, method_config
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
