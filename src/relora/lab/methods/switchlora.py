"""switchlora: restarts of single pairs of vectors, a few every step (after SwitchLoRA, arXiv 2406.06564).

Of each layer's `rank` pairs (row i of lora_A, column i of lora_B), n(t) are switched after step t:

    W <- W + s b_i a_i^T,    a_i <- new,    b_i <- 0,    state and step count of a_i and b_i <- 0

with n(t) = rank / interval * exp(-theta t) on average, theta such that it is a third after `third_at` of
the low-rank phase; the fraction of n(t) is rounded by a coin. A new a_i waits for freeze_steps, in which b_i
moves away from 0. SwitchLoRA swaps against stored candidates, with b_i other than 0; here what comes in is
new, so that the function never changes and nothing is stored. Hence "like".
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from relora.lab.methods.counted import CountedRestarts
from relora.lab.methods.options import SwitchOptions
from relora.train.groups import PhaseName, parameter_groups
from relora.train.joint import JointOptimizer
from relora.train.method_parts import (
    FACTOR_INITS,
    Draw,
    LoRALinear,
    RestartReport,
    derived_generator,
    lora_parameters,
)
from relora.train.phase import Optimizer, Plan, adamw_of


class VectorAdam(TorchOptimizer):
    """Adam with a step count for each vector of a factor, and vectors that may wait.

    A group's `vectors` says along which dimension they lie: 0 for the rows of lora_A, 1 for the columns of
    lora_B.
    """

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], vectors: int = 0, eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "vectors": vectors})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every vector that does not wait."""
        assert closure is None
        for group in self.param_groups:
            for factor in group["params"]:
                if factor.grad is not None:
                    self._step_(factor, factor.grad, group, vector_state(self.state[factor], factor, group))
        return None

    def _step_(self, factor: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        moving = state["waits"] <= 0
        state["waits"].sub_(1).clamp_(min=0)
        state["updates"].add_(moving)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # What waits forgets: its moments begin with its first update, as its count does.
        keep = _along(moving.to(factor.dtype), group["vectors"])
        state["exp_avg"].mul_(keep)
        state["exp_avg_sq"].mul_(keep)
        counts = _along(state["updates"].clamp(min=1).to(factor.dtype), group["vectors"])
        root = (state["exp_avg_sq"] / (1 - beta2**counts)).sqrt_().add_(group["eps"])
        factor.addcdiv_(state["exp_avg"] / (1 - beta1**counts), root, value=-group["lr"])


def vector_state(state: dict[str, Any], factor: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a factor, begun if there is none."""
    if not state:
        count = factor.shape[group["vectors"]]
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(factor), torch.zeros_like(factor)
        state["updates"] = torch.zeros(count, dtype=torch.int64, device=factor.device)
        state["waits"] = torch.zeros(count, dtype=torch.int64, device=factor.device)
    return state


def _along(values: Tensor, dimension: int) -> Tensor:
    return values.unsqueeze(1) if dimension == 0 else values.unsqueeze(0)


class SwitchLoRA(CountedRestarts):
    """A few pairs of vectors restart after every step."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.counters = {"vectors_switched": 0}

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return AdamW for a warm start; then VectorAdam on the factors and AdamW on the rest, as one."""
        if phase != "low_rank":
            return super().build_optimizer(model, phase)
        optim = self.recipe.optim
        factors = dict(lora_parameters(model))
        rest = parameter_groups(model, self.recipe, phase)[1:]
        by_kind = [[p for name, p in factors.items() if name.endswith(kind)] for kind in ("lora_A", "lora_B")]
        joint = JointOptimizer(
            [
                (
                    [{"params": params, "vectors": along} for along, params in enumerate(by_kind)],
                    lambda groups: VectorAdam(groups, lr=optim.factor_lr_in_force, betas=optim.betas),
                ),
                ([group.options() for group in rest], adamw_of(self.recipe, rest[0].params[0].device)),
            ]
        )
        rates = [optim.factor_lr_in_force] * len(by_kind) + [group.lr for group in rest]
        return Optimizer(adamw=joint, peaks=tuple(rates))

    def attach(self, model: nn.Module, optimizer: TorchOptimizer) -> None:
        """Take hold of the factors and of what steps them."""
        self.layers, self.optimizer = [m for m in model.modules() if isinstance(m, LoRALinear)], optimizer

    def after_step(self, step: int) -> RestartReport | None:
        """Switch the pairs of this step; none after the last."""
        if not self.layers or step >= self.recipe.total_steps:
            return None
        for layer in self.layers:
            generator = derived_generator(self.recipe.run.seed, step, layer.name, "switch")
            wanted = self.expected_switches(step)
            count = int(wanted) + int(float(torch.rand((), generator=generator)) < wanted % 1)
            if count:
                chosen = torch.randperm(self.recipe.relora.rank, generator=generator)[:count]
                self._switch_vectors_(layer, chosen, step)
        return None

    def expected_switches(self, step: int) -> float:
        """Return how many pairs of a layer are switched after a step, on average."""
        options = self.recipe.options
        assert isinstance(options, SwitchOptions)
        length = self.recipe.total_steps - self.start
        decay = math.exp(-math.log(3) * (step - self.start) / (options.third_at * length))
        return self.recipe.relora.rank / options.interval * decay

    @torch.no_grad()
    def _switch_vectors_(self, layer: LoRALinear, chosen: Tensor, step: int) -> None:
        options = self.recipe.options
        assert isinstance(options, SwitchOptions) and self.optimizer is not None
        chosen = chosen.to(layer.weight.device)
        dtype = layer.merge_dtype
        rows_of_a = layer.lora_A[chosen].to(dtype)
        for rows in layer.row_blocks():
            delta = layer.fixed_scaling * layer.lora_B[rows][:, chosen].to(dtype) @ rows_of_a
            layer.write_master_rows_(rows, layer.master_rows(rows).to(dtype) + delta)
        layer.claim_residual_()
        drawn = Draw(
            rank=len(chosen),
            in_features=layer.in_features,
            seed=self.recipe.run.seed,
            restart_index=step,
            name=layer.name,
            device=torch.device("cpu"),  # a few rows: fast there, and the same on every rank
        )
        layer.lora_A[chosen] = FACTOR_INITS[layer.config.factor_init].draw(drawn).to(layer.lora_A)
        layer.lora_B[:, chosen] = 0
        for factor, along in ((layer.lora_A, 0), (layer.lora_B, 1)):
            state = self.optimizer.state[factor]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment].index_fill_(along, chosen, 0)
            state["updates"][chosen] = 0
            state["waits"][chosen] = options.freeze_steps if along == 0 else 0
        self.counters["vectors_switched"] += len(chosen)
