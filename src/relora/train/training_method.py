"""What a method does in a run: a value with hooks, called by the trainer at fixed points.

    build_optimizer, attach        when a phase begins (and when a checkpoint of it is opened)
    switch_                        at the end of the warm start
    after_backward                 in every step, between the gradients and their clipping
    step_refused                   where a step was not finite, before its after_step
    after_step                     in every step, after the update and before logs and checkpoints
    step_effects                   where a step is logged
    state_dict, load_state_dict    in checkpoints, beside the model's, the optimizer's and the random states

`TrainingMethod` itself is full rank; each other changes what differs. Whatever a method draws it derives from
(seed, step, name), and whatever it remembers goes into a checkpoint: a resumed run is the uninterrupted one.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer as TorchOptimizer

from relora.data.prepared import PreparedData
from relora.errors import OptimizerResetError
from relora.method.complement_report import ComplementReport
from relora.method.restart import ReLoRA
from relora.method.restart_report import RestartReport
from relora.train.config import Recipe
from relora.train.groups import PhaseName
from relora.train.in_place_optimizer import InPlaceOptimizer, in_place_beside_adamw
from relora.train.joint import parts_of
from relora.train.phase import (
    Optimizer,
    Plan,
    build_optimizer,
    inject_factors,
    method_config,
    momenta,
    num_in_place,
)


class TrainingMethod:
    """Every weight trains, by AdamW, from the first step to the last."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recipe = plan.recipe

    def model_recipe(self, data: PreparedData) -> Recipe:
        """Return the recipe that the run's model is built by; the run's own unless the method says."""
        del data
        return self.recipe

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """Return the optimizer of a phase, with the peak learning rate of each of its groups."""
        return build_optimizer(model, self.recipe, phase)

    def switch_(self, model: nn.Module) -> str:
        """Change the model as the second phase wants it, in place; return what was done, in words."""
        del model
        raise AssertionError(f"{self.recipe.run.method} has no switch")

    def attach(self, model: nn.Module, optimizer: TorchOptimizer) -> None:
        """Take hold of what the phase that now begins (or goes on) trains."""

    def after_backward(self, step: int) -> None:
        """See, and change, the gradients of a step before they are clipped."""

    def step_refused(self, step: int) -> str:
        """Take note that a step was not finite and so not taken; `after_step` follows all the same.

        Returns:
            What it costs besides the step, in words; "" for nothing.
        """
        del step
        return ""

    def after_step(self, step: int) -> RestartReport | None:
        """Do what follows the update of a step; return the report of a restart if there was one."""

    def step_effects(self) -> Mapping[str, ComplementReport]:
        """Return what the last step taken did without a gradient of autograd's, by the name in the log."""
        return {}

    def catch_up(self) -> RestartReport | None:
        """Do the restart that a shorter run left out at its end, where a longer one goes on."""

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a checkpoint must keep besides model and optimizer, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""

    @property
    def num_in_place(self) -> int:
        """Weights that train although autograd has no gradient of them, at the end of a run."""
        return 0

    def facts(self) -> dict[str, Any]:
        """Return what the summary of a finished run should say of the method, as JSON values."""
        return {}


class SteppedInPlace(TrainingMethod):
    """Full rank, whose target matrices may step in place, beside AdamW for everything else."""

    in_place: InPlaceOptimizer | None = None
    """What trains the target matrices, where they step in place."""

    def step_refused(self, step: int) -> str:
        """Let what was seen of the step move nothing."""
        return "" if self.in_place is None else self.in_place.refuse(step)

    def step_effects(self) -> Mapping[str, ComplementReport]:
        """Return what the step in place moved."""
        report = None if self.in_place is None else self.in_place.report
        return {} if report is None else {"in_place": report}

    def state_dict(self) -> dict[str, Any] | None:
        """Return what steps in place count."""
        return None if self.in_place is None else self.in_place.state_of_steps()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a step in place."""
        assert self.in_place is not None
        self.in_place.go_on_from(state)

    @property
    def num_in_place(self) -> int:
        """All weights of the matrices that step in place."""
        return 0 if self.in_place is None else num_in_place(self.in_place)


class LowRank(SteppedInPlace):
    """Factors beside frozen weights, trained beside what stays at full rank."""

    def build_optimizer(self, model: nn.Module, phase: PhaseName) -> Optimizer:
        """As `TrainingMethod`; a warm start by steps in place has them beside AdamW, the matrices first."""
        kind = self.recipe.warm_start_in_place
        if phase != "warm_start" or kind is None:
            return super().build_optimizer(model, phase)
        optimizer, self.in_place = in_place_beside_adamw(
            model, self.recipe, kind=kind, scale=self.recipe.relora.warm_start_scale
        )
        return optimizer

    def switch_(self, model: nn.Module) -> str:
        """Put the factors in."""
        if self.in_place is not None:
            self.in_place.release_()
            self.in_place = None
        return str(inject_factors(model, self.recipe))


class Restarting(LowRank):
    """Factors that are merged and begun anew at the ends of cycles."""

    restarter: ReLoRA | None = None
    _was_taken = True
    """Whether the step that `after_step` is told of was taken."""
    _keeps_momentum = False

    def attach(self, model: nn.Module, optimizer: TorchOptimizer) -> None:
        """Make what restarts an injected model; before the switch there is none."""
        self.restarter = ReLoRA(
            model,
            parts_of(optimizer),
            method_config(self.recipe),
            seed=self.recipe.run.seed,
            start=self.plan.switch_step or 0,
            end=self.recipe.total_steps,
            last_restart=self.plan.last_restart,
        )
        self._keeps_momentum = bool(momenta(model))

    def step_refused(self, step: int) -> str:
        """As `SteppedInPlace`; and the complement's momentum, which the step has gone into, is forgotten."""
        if self.restarter is None:
            return super().step_refused(step)
        self._was_taken = False
        return "the complement's momentum begins anew" if self._keeps_momentum else ""

    def after_step(self, step: int) -> RestartReport | None:
        """Restart at the end of a cycle.

        Raises:
            OptimizerResetError: if the reset did not do what it reports, or the cycle trained nothing.
        """
        if self.restarter is None:
            return None
        was_taken, self._was_taken = self._was_taken, True
        report = self.restarter.after_step(step, was_taken=was_taken)
        # A cycle whose last steps were not taken may be still.
        return refuse_dead_cycle(report) if was_taken else report

    def step_effects(self) -> Mapping[str, ComplementReport]:
        """Return what the step on the complement moved; before the switch as `SteppedInPlace`."""
        if self.restarter is None:
            return super().step_effects()
        report = self.restarter.complement_report
        return {} if report is None else {"complement": report}

    def catch_up(self) -> RestartReport | None:
        """As `ReLoRA.catch_up`."""
        return None if self.restarter is None else refuse_dead_cycle(self.restarter.catch_up())

    def state_dict(self) -> dict[str, Any] | None:
        """Return the restart counters; before the switch as `SteppedInPlace`."""
        return super().state_dict() if self.restarter is None else self.restarter.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the restart counters, or what `SteppedInPlace` keeps."""
        if self.restarter is None:
            super().load_state_dict(state)
        else:
            self.restarter.load_state_dict(state)


def refuse_dead_cycle(restart: RestartReport | None) -> RestartReport | None:
    """Return a restart's report; raise OptimizerResetError if it had nothing to merge."""
    if restart is not None and len(restart.merge.unmoved_layers) == restart.num_layers:
        raise OptimizerResetError(
            f"restart {restart.restart_index} at step {restart.step} merged nothing: no factor has moved "
            "in its cycle. Is optim.factor_lr too small, or the whole cycle a ramp?"
        )
    return restart
