"""full-muon: every weight trains, hidden matrices by Muon and the rest by AdamW.

Muon orthogonalises the momentum of a matrix; with the RMS of its update matched to AdamW's (torch's
"match_rms_adamw", 0.2 sqrt(max(out, in)) times the orthogonal matrix), a learning rate means about the same.
"""

from torch import nn
from torch.optim import AdamW, Muon

from relora.lab.methods.joint import JointOptimizer
from relora.lab.methods.options import MuonOptions
from relora.train.method_parts import choose_targets
from relora.train.phase import Optimizer, PhaseName, method_config
from relora.train.training_method import TrainingMethod


class FullMuon(TrainingMethod):
    """Muon on the target layers of the [relora] section, AdamW on everything else."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both optimizers as one: Muon's matrices first."""
        del phase
        options, optim = self.recipe.options, self.recipe.optim
        assert isinstance(options, MuonOptions)
        rest_lr = optim.lr if options.adamw_lr is None else options.adamw_lr
        layers = choose_targets(model, method_config(self.recipe)).layers.values()
        hidden = [layer.get_parameter("weight") for layer in layers]
        rest = [p for p in model.parameters() if id(p) not in set(map(id, hidden))]
        matrices, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
        decay = optim.weight_decay
        joint = JointOptimizer(
            [
                (
                    [{"params": hidden}],
                    lambda groups: Muon(
                        groups,
                        lr=optim.lr,
                        weight_decay=decay,
                        momentum=options.momentum,
                        adjust_lr_fn="match_rms_adamw",
                    ),
                ),
                (
                    [{"params": p, "weight_decay": d} for p, d in ((matrices, decay), (vectors, 0.0)) if p],
                    lambda groups: AdamW(groups, lr=rest_lr, betas=optim.betas, fused=True),
                ),
            ]
        )
        rates = [optim.lr] + [rest_lr] * (len(joint.param_groups) - 1)
        return Optimizer(adamw=joint, peaks=tuple(rates))
