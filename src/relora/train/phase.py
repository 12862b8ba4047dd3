"""The two phases of a run, and the switch between them.

At full rank AdamW trains every weight, or every one but those that step in place. At the switch the target
weights freeze, their gradients and states are freed, and a new AdamW trains the factors beside what stays at
full rank, each with its own learning rate. Of what stays (embeddings, head, norms, biases) it keeps the
memory: nothing changes for them, and an Adam that has forgotten steps by its whole learning rate in every
entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import Optimizer as TorchOptimizer

from relora.method.config import ReLoRAConfig
from relora.method.inject import InjectReport, inject
from relora.method.linear import LoRALinear
from relora.method.schedule import Calendar, jagged_cosine
from relora.train.config import Recipe
from relora.train.groups import Group, PhaseName, parameter_groups, rest_groups
from relora.train.joint import Groups, JointOptimizer, matched_muon, parts_of

Memory = Mapping[Tensor, dict[str, Any]]
"""The states of an AdamW by parameter."""


@dataclass(kw_only=True)
class Plan:
    """When the switch and the restarts fall, and the learning rate of each step."""

    recipe: Recipe
    ended_at: int | None = None
    """The step with which its loss has ended the warm start, before relora.warm_start_steps had passed."""

    @property
    def switch_step(self) -> int | None:
        """The last step of the warm start; 0 starts cold, None never switches."""
        return self.recipe.switch_step if self.ended_at is None else self.ended_at

    def watches_loss(self, step: int) -> bool:
        """Tell whether the loss of a step may end the warm start."""
        longest = self.recipe.switch_step
        is_watched = self.recipe.relora.warm_start_until == "plateau" and self.ended_at is None
        return is_watched and longest is not None and self.recipe.schedule.warmup_steps < step < longest

    @property
    def restart_steps(self) -> tuple[int, ...]:
        """The steps after which a restart happens."""
        last = self.last_restart
        return tuple(step for step in self._all_restarts if last is None or step <= last)

    @property
    def skipped_restarts(self) -> tuple[int, ...]:
        """Restarts left out because the run ends before their re-warm would."""
        return self._all_restarts[len(self.restart_steps) :]

    def multiplier(self, step: int) -> float:
        """Return the learning rate of a step, as a fraction of its peak."""
        recipe, start = self.recipe, self.switch_step
        return jagged_cosine(
            step - 1,
            total_steps=recipe.total_steps,
            warmup_steps=recipe.schedule.warmup_steps,
            restart_every=self._restart_every,
            rewarmup_steps=0 if start is None else recipe.schedule.rewarmup_steps,
            min_ratio=recipe.schedule.min_ratio,
            start=start or 0,
            restart_growth=recipe.relora.restart_growth,
            last_restart=self.last_restart,
        )

    def phase(self, step: int) -> PhaseName:
        """Return the phase that a step belongs to."""
        if self.switch_step is None:
            return "full"
        return "warm_start" if step <= self.switch_step else "low_rank"

    @property
    def _restart_every(self) -> int:
        """The cycle's length; for plain LoRA the whole run is one."""
        return self.recipe.relora.restart_every if self._restarts else self.recipe.total_steps

    @property
    def _restarts(self) -> bool:
        return self.recipe.spec.restarts

    @property
    def _all_restarts(self) -> tuple[int, ...]:
        if not self._restarts:
            return ()
        return Calendar(
            restart_every=self._restart_every,
            restart_growth=self.recipe.relora.restart_growth,
            start=self.switch_step or 0,
            end=self.recipe.total_steps,
        ).restarts_until(self.recipe.total_steps)

    @property
    def last_restart(self) -> int | None:
        """No restart falls later than this, so that every re-warm ends before the run does."""
        rewarmup = self.recipe.schedule.rewarmup_steps
        return self.recipe.total_steps - rewarmup - 1 if rewarmup else None


def method_config(recipe: Recipe) -> ReLoRAConfig:
    """Return the method's own part of the [relora] section; only what restarts steps on the complement."""
    fields = {name: getattr(recipe.relora, name) for name in ReLoRAConfig.__dataclass_fields__}
    if not recipe.spec.restarts:
        fields |= {"residual": "none", "residual_scale": 1.0, "residual_every": 1, "residual_layers": None}
    return ReLoRAConfig(**fields)


def inject_factors(model: nn.Module, recipe: Recipe) -> InjectReport:
    """Switch a model to low rank; its seeds are the run's."""
    return inject(model, method_config(recipe), seed=recipe.run.seed)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, or what a method steps in its place, and the peak learning rate of each of its groups."""

    adamw: TorchOptimizer
    peaks: tuple[float, ...]

    def set_multiplier_(self, multiplier: float) -> None:
        """Set every group's learning rate to a fraction of its peak."""
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * multiplier

    @property
    def lr(self) -> float:
        """The learning rate of the first group: the factors', or the matrices' at full rank."""
        return float(self.adamw.param_groups[0]["lr"])


def build_optimizer(model: nn.Module, recipe: Recipe, phase: PhaseName) -> Optimizer:
    """Build AdamW over what trains in a phase, in the groups of `parameter_groups`.

    With optim.factor_optimizer "muon" the factors are Muon's, and both look like one optimizer.
    """
    groups = parameter_groups(model, recipe, phase)
    muon = [group for group in groups if group.by_muon]
    adamw = [group for group in groups if not group.by_muon]
    make_adamw = adamw_of(recipe, groups[0].params[0].device)
    options = [group.options() for group in adamw]
    if not muon:
        made = make_adamw(options)
    else:
        made = JointOptimizer([([group.options() for group in muon], matched_muon), (options, make_adamw)])
    return Optimizer(adamw=made, peaks=tuple(group.lr for group in (*muon, *adamw)))


def beside_adamw(
    model: nn.Module,
    recipe: Recipe,
    layers: Mapping[str, nn.Module],
    *,
    by: Callable[[Groups], TorchOptimizer],
    scale: float = 1.0,
    adamw_lr: float | None = None,
) -> Optimizer:
    """Return one optimizer of two: of the weights of some layers, and AdamW of everything else.

    Args:
        model: The model.
        recipe: Of the run.
        layers: Whose weights they are, by name.
        by: Makes the first from its group.
        scale: Peak of the first one's rate over optim.lr; its weight decay is that of optim.lr all the same.
        adamw_lr: Peak of AdamW's rate; None means optim.lr.
    """
    optim = recipe.optim
    hidden = [layer.get_parameter("weight") for layer in layers.values()]
    others = [p for p in model.parameters() if id(p) not in set(map(id, hidden))]
    rest = rest_groups(model, others, optim, lr=optim.lr if adamw_lr is None else adamw_lr)
    first = Group(params=hidden, lr=optim.lr * scale, weight_decay=optim.weight_decay / scale)
    adamw = ([group.options() for group in rest], adamw_of(recipe, hidden[0].device))
    joint = JointOptimizer([([first.options()], by), adamw])
    return Optimizer(adamw=joint, peaks=tuple(group.lr for group in (first, *rest)))


def adamw_of(recipe: Recipe, device: torch.device) -> Callable[[Groups], TorchOptimizer]:
    """Return what makes a recipe's AdamW from groups that have their learning rates."""
    fused = True if device.type in ("cuda", "cpu") else None
    return lambda groups: AdamW(groups, betas=recipe.optim.betas, fused=fused)


def carry_memory_(memory: Memory, optimizer: TorchOptimizer) -> int:
    """Let AdamW go on with what an earlier AdamW knew of those parameters that both train.

    Args:
        memory: The earlier one's states.
        optimizer: AdamW, or one of which AdamW is a part.

    Returns:
        The number of those parameters.
    """
    groups = [g for part in parts_of(optimizer) if isinstance(part, AdamW) for g in part.param_groups]
    known = [p for group in groups for p in group["params"] if p in memory]
    optimizer.state.update({p: memory[p] for p in known})
    return len(known)


def num_in_place(optimizer: TorchOptimizer) -> int:
    """Count the weights that an optimizer moves although autograd has no gradient of them."""
    groups = optimizer.param_groups
    return sum(p.numel() for group in groups for p in group["params"] if not p.requires_grad)


def free_gradients_(model: nn.Module) -> None:
    """Drop every gradient, so that the switch does not carry the full-rank ones along."""
    for parameter in model.parameters():
        parameter.grad = None


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Count a model's parameters, or those of them that train; a base held as codes counts its weights."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
    layers = [] if trainable else [module for module in model.modules() if isinstance(module, LoRALinear)]
    return count + sum(m.out_features * m.in_features - m.weight.numel() for m in layers)


def state_bytes(optimizer: TorchOptimizer, model: nn.Module) -> int:
    """Return the bytes of an optimizer's state tensors, and of the momenta that low-rank layers keep."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    kept = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    return kept + momentum_bytes(model)


def momenta(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what `relora.residual` keeps from step to step, by the names it is saved under."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    found = {f"{layer.name}.weight_momentum": layer.weight_momentum for layer in layers}
    return {name: momentum for name, momentum in found.items() if momentum is not None}


def momentum_bytes(model: nn.Module) -> int:
    """Return the bytes of `momenta`."""
    return sum(momentum.nbytes for momentum in momenta(model).values())
