"""What the laboratory's own restarts count, and how their counters go into checkpoints."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer as TorchOptimizer

from relora.errors import CheckpointError
from relora.train.method_parts import LoRALinear, lora_layers, lora_parameters
from relora.train.phase import Plan
from relora.train.training_method import LowRank

Factor = tuple[str, nn.Parameter]


class CountedRestarts(LowRank):
    """Factors with merges and optimizer resets of a method's own; counters in JSON."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.counters: dict[str, int] = {"merges": 0, "optimizer_resets": 0}
        self.layers: list[LoRALinear] = []
        self.optimizer: TorchOptimizer | None = None
        self.factors: list[Factor] = []
        self.restart_steps: frozenset[int] = frozenset()

    def attach(self, model: nn.Module, optimizer: TorchOptimizer) -> None:
        """Take hold of the factors and of what steps them."""
        self.layers, self.optimizer = lora_layers(model), optimizer
        self.restart_steps = frozenset(self.plan.restart_steps)
        self.factors = [(name, p) for name, p in lora_parameters(model) if p.requires_grad]

    def state_dict(self) -> dict[str, Any] | None:
        """Return the counters; None before the switch."""
        return dict(self.counters) if self.layers else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counters.

        Raises:
            CheckpointError: if they are others.
        """
        if set(state) != set(self.counters):
            raise CheckpointError(
                f"{self.recipe.run.method} counts {sorted(self.counters)}, the checkpoint {sorted(state)}"
            )
        self.counters = {name: int(count) for name, count in state.items()}

    def facts(self) -> dict[str, Any]:
        """Return the counters."""
        return dict(self.counters)

    @property
    def start(self) -> int:
        """The step of the switch."""
        return self.plan.switch_step or 0
