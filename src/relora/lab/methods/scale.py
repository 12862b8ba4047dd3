"""full-scale: every matrix trains by its normalised gradient, without state but for the head's momentum.

After SCALE (arXiv 2506.16659): the gradient of a linear layer (out, in) is scaled so that what reaches each
output has RMS 1, an embedding's (V, D) so that each of its D columns has; the output head takes its momentum,
decayed by 0.9, in place of its gradient. Vectors are AdamW's. A step has an RMS of the learning rate, about
five times that of AdamW at the same rate, so the best rate is another.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from relora.lab.methods.options import ScaleOptions
from relora.train.groups import Group, PhaseName, head_weights, rest_groups
from relora.train.joint import JointOptimizer
from relora.train.phase import Optimizer, adamw_of
from relora.train.training_method import TrainingMethod


class NormalisedSGD(TorchOptimizer):
    """SGD on gradients of RMS 1 along one dimension, with momentum where a group has one.

    Args:
        params: Matrices, or groups of them; `dim` is the dimension that the RMS is taken over.
        lr: Learning rate.
        dim: 1 normalises rows, 0 columns.
        momentum: Decay of the gradient's running mean; 0 keeps no state.
        weight_decay: Decoupled.
    """

    def __init__(
        self, params: Any, *, lr: float = 1e-3, dim: int = 1, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "dim": dim, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_(weight, weight.grad, group)
        return None

    def _step_(self, weight: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            state = self.state[weight]
            if not state:
                state["exp_avg"] = torch.zeros_like(direction)
            direction = state["exp_avg"].lerp_(direction, 1 - group["momentum"])
        rms = direction.float().square().mean(group["dim"], keepdim=True).sqrt()
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(torch.where(rms > 0, direction / rms, 0).to(weight.dtype), alpha=group["lr"])


class FullScale(TrainingMethod):
    """Normalised SGD on matrices, AdamW on what is none."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return both as one: hidden matrices first, then embeddings, the head and vectors."""
        del phase
        options, optim = self.recipe.options, self.recipe.optim
        assert isinstance(options, ScaleOptions)
        parameters = list(model.parameters())
        transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        heads = head_weights(model)

        def as_group(group: Group) -> list[dict[str, Any]]:
            found: dict[tuple[int, float], list[nn.Parameter]] = {}
            for p in group.params:
                along = 0 if id(p) in transposed | embeddings else 1
                found.setdefault((along, options.momentum if id(p) in heads else 0.0), []).append(p)
            own = {"lr": group.lr, "weight_decay": group.weight_decay}
            return [{"params": p, "dim": dim, "momentum": beta, **own} for (dim, beta), p in found.items()]

        matrices = rest_groups(model, (p for p in parameters if p.ndim == 2), optim, lr=optim.lr)
        vector_lr = optim.lr if options.adamw_lr is None else options.adamw_lr
        vectors = rest_groups(model, (p for p in parameters if p.ndim != 2), optim, lr=vector_lr)
        joint = JointOptimizer(
            [
                ([each for group in matrices for each in as_group(group)], NormalisedSGD),
                ([group.options() for group in vectors], adamw_of(self.recipe, parameters[0].device)),
            ]
        )
        return Optimizer(adamw=joint, peaks=tuple(group["lr"] for group in joint.param_groups))
