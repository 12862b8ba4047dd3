"""Who looks at the base's gradient in which step, and what a restart and a step make of it.

Observers are attached to the layers for one step at a time, so what was seen of a step that never came to its
end is dropped, never carried into the next (a momentum is of all steps, and dropped with one of them); which
steps need which is known from the calendar, so a resumed run needs nothing but its counters and its model.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from relora.method.complement import Complement
from relora.method.complement_report import ComplementReport
from relora.method.config import ReLoRAConfig
from relora.method.factor_init import FACTOR_INITS
from relora.method.gradient_init import GradientInitReport, Sketch, take_gradient_rows_
from relora.method.linear import LoRALinear
from relora.method.observe import Observer, Observers, refuse_compiled


class Watch:
    """The observers of a run's layers.

    Args:
        model: The injected model or a wrapper around it.
        layers: Its layers.
        config: Says what is to be seen.
        seed: Root of the sketches' seeds.

    Raises:
        ConfigError: if something is to be seen and the model is compiled.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[LoRALinear], config: ReLoRAConfig, *, seed: int
    ) -> None:
        self._layers, self._seed = layers, seed
        self._complement = Complement(layers, config, seed=seed) if config.residual != "none" else None
        self._needs_gradient = FACTOR_INITS[config.factor_init].needs_gradient
        self._sketches: list[Sketch] = []
        if self._complement is not None:
            refuse_compiled(model, f"residual={config.residual!r}")
        if self._needs_gradient:
            refuse_compiled(model, f"init={config.factor_init!r}")

    def begin_step(self, steps_done: int, *, next_restart_index: int, ends_cycle: bool) -> None:
        """Attach what the next step needs, and drop what was seen before.

        Args:
            steps_done: Since injection, without the next.
            next_restart_index: Which restart comes next; it seeds the sketches.
            ends_cycle: Whether it comes after the next step.
        """
        seen = [] if self._complement is None else self._complement.observers(steps_done)
        complement: Mapping[LoRALinear, Observer] = {observer.layer: observer for observer in seen}
        sketched = self._layers if self._needs_gradient and ends_cycle else ()
        self._sketches = [
            Sketch(layer, seed=self._seed, restart_index=next_restart_index) for layer in sketched
        ]
        sketches: Mapping[LoRALinear, Observer] = {sketch.layer: sketch for sketch in self._sketches}
        for layer in self._layers:
            told = [observers[layer] for observers in (complement, sketches) if layer in observers]
            layer.observers = Observers(told) if told else ()

    def drop(self, *, was_seen: bool) -> None:
        """Detach every observer, and forget what was seen.

        Args:
            was_seen: Whether the step had its backward passes; if not, what this rank saw tells.
        """
        self._sketches = []
        if self._complement is not None:
            self._complement.drop(was_seen=was_seen)
        for layer in self._layers:
            layer.observers = ()

    def take_gradient_rows_(self, *, seen: bool = True) -> GradientInitReport | None:
        """Give layers that a restart has just re-initialised the rows their gradients call for.

        Args:
            seen: Whether the step that was observed is the one of this restart.

        Returns:
            Where the rows come from; None if the config asks for no gradient.
        """
        if not self._needs_gradient:
            return None
        return take_gradient_rows_(self._layers, self._sketches if seen else ())

    def refuse_unseen(self, step: int) -> None:
        """Refuse a step that was to be observed and was not, before anything changes.

        Raises:
            ConfigError: if no backward pass went through any layer.
        """
        if self._complement is not None:
            self._complement.refuse_unseen(step)

    def step_complement_(self, step: int, optimizers: Iterable[Optimizer]) -> ComplementReport | None:
        """Step on the complement, if the config asks for it and the step was observed.

        Args:
            step: The step just taken.
            optimizers: They know the learning rates in force.
        """
        if self._complement is None:
            return None
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        lrs = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        return self._complement.apply_(step, lrs)
