"""galore: Adam in a subspace of the gradient, projected back (arXiv 2403.03507, Algorithms 1 and 2).

For a weight (m, n) with m >= n the projector P (r, n) has orthonormal rows and the gradient becomes G P^T;
otherwise P (m, r) has orthonormal columns and it becomes P^T G. Adam's moments live there, W moves by
-lr * scale * (the update projected back). P is computed anew from the current gradient every refresh_every
steps; the moments stay as they are, in what are then other coordinates, as published.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from relora.lab.methods.options import GaLoreOptions
from relora.train.groups import PhaseName, rest_groups
from relora.train.joint import JointOptimizer
from relora.train.method_parts import choose_targets, derived_generator
from relora.train.phase import Optimizer, adamw_of, method_config
from relora.train.training_method import TrainingMethod

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


class GaLoreAdam(TorchOptimizer):
    """Adam on projected gradients.

    Args:
        params: Matrices.
        names: The name of each; with `seed` it determines the randomised projector.
        rank: Of the projectors.
        refresh_every: Steps between two projectors.
        scale: Multiplier of the update.
        randomised: Find the subspace by a random range finder instead of a whole SVD.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled.
        seed: Root of the random numbers.
    """

    def __init__(
        self,
        params: Any,
        *,
        names: Mapping[Tensor, str],
        rank: int,
        refresh_every: int,
        scale: float,
        randomised: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._names, self._seed = names, seed
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "refresh_every": refresh_every,
                "scale": scale,
                "randomised": randomised,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_(weight, weight.grad.float(), group, self.state[weight])
        return None

    def _step_(self, weight: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        done = int(state.get("updates", 0))
        if done % group["refresh_every"] == 0:
            state["projector"] = self._projector(weight, grad, group, done)
        low = project(grad, state["projector"])
        if not done:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["updates"] = torch.tensor(done + 1, dtype=torch.int64)
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2 ** (done + 1))).sqrt_().add_(group["eps"])
        update = state["exp_avg"] / (1 - beta1 ** (done + 1)) / root
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        back = project_back(update, state["projector"], weight.shape)
        weight.add_(back, alpha=-group["lr"] * group["scale"])

    def _projector(self, weight: Tensor, grad: Tensor, group: dict[str, Any], done: int) -> Tensor:
        generator = derived_generator(self._seed, self._names[weight], "projector", done)
        return leading_directions(
            grad, group["rank"], generator=generator if group["randomised"] else None
        ).to(grad.dtype)


def leading_directions(grad: Tensor, rank: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Return the leading singular vectors of a gradient (m, n).

    They are the right ones, (rank, n), if m >= n, and the left ones, (m, rank), otherwise.

    Args:
        grad: The gradient.
        rank: How many.
        generator: Find them in the range of the gradient applied to random vectors, after two power
            iterations (Halko et al. 2011); None takes the singular value decomposition.
    """
    tall = grad.shape[0] >= grad.shape[1]
    if generator is None:
        # Of the gradient itself, not of its transpose: the vectors' signs are the library's, and the moments,
        # which are kept across a refresh, feel them.
        left, _, right = torch.linalg.svd(grad, full_matrices=False)
        leading: Tensor = right[:rank] if tall else left[:, :rank]
        return leading.contiguous()
    wide = grad.T if tall else grad  # the short side first
    count = min(rank + _OVERSAMPLING, wide.shape[0])
    probes = torch.randn(wide.shape[1], count, generator=generator).to(wide)
    basis = torch.linalg.qr(wide @ probes)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    vectors: Tensor = (basis @ torch.linalg.svd(basis.T @ wide, full_matrices=False)[0])[:, :rank]
    return vectors.T.contiguous() if tall else vectors.contiguous()


def project(grad: Tensor, projector: Tensor) -> Tensor:
    """Return the gradient's coordinates: (m, rank) or (rank, n)."""
    if projector.shape[1] == grad.shape[1]:
        return grad @ projector.T
    return projector.T @ grad


def project_back(low: Tensor, projector: Tensor, shape: torch.Size) -> Tensor:
    """Return coordinates as a matrix of the weight's shape."""
    return low @ projector if projector.shape[1] == shape[1] else projector @ low


class GaLore(TrainingMethod):
    """GaLore on the target layers of the [relora] section, AdamW on everything else."""

    def switch_(self, model: nn.Module) -> str:
        """Leave the model as it is: only the optimizer changes."""
        count = len(choose_targets(model, method_config(self.recipe)).layers)
        return f"the gradients of {count} matrices are projected to rank {self.recipe.relora.rank}"

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return AdamW for a warm start; then both as one, the projected matrices first."""
        if phase != "low_rank":
            return super().build_optimizer(model, phase)
        options, optim, relora = self.recipe.options, self.recipe.optim, self.recipe.relora
        assert isinstance(options, GaLoreOptions)
        layers = choose_targets(model, method_config(self.recipe)).layers
        names: dict[Tensor, str] = {layer.get_parameter("weight"): name for name, layer in layers.items()}
        others = [p for p in model.parameters() if p not in names]
        rest = rest_groups(model, others, optim, lr=optim.low_rank_lr_in_force)
        joint = JointOptimizer(
            [
                (
                    [{"params": list(names)}],
                    lambda groups: GaLoreAdam(
                        groups,
                        names=names,
                        rank=relora.rank,
                        refresh_every=options.refresh_every,
                        scale=options.scale,
                        randomised=options.projector == "randomised",
                        lr=optim.factor_lr_in_force,
                        betas=optim.betas,
                        weight_decay=optim.weight_decay,
                        seed=self.recipe.run.seed,
                    ),
                ),
                ([group.options() for group in rest], adamw_of(self.recipe, next(iter(names)).device)),
            ]
        )
        rates = (optim.factor_lr_in_force, *(group.lr for group in rest))
        return Optimizer(adamw=joint, peaks=rates)
