"""What a restart does to the optimizer's memory, by `ReLoRAConfig.reset`: one entry a policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from relora.method.config import ReLoRAConfig, ResetMethod
from relora.method.reset import RESET_METHODS, ResetReport, reset_optimizer_state_
from relora.method.transport import transport_optimizer_state_

Factors = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What a policy may draw on."""

    config: ReLoRAConfig
    seed: int
    """Of this restart."""
    overlaps: Mapping[str, Tensor]
    """A_old A_new^T by the name of each lora_B; empty unless `config.reset` needs it."""


StatePolicy = Callable[[Optimizer, Factors, ResetMethod, Renewal], ResetReport]


def _clear_(optimizer: Optimizer, factors: Factors, method: ResetMethod, renewal: Renewal) -> ResetReport:
    return reset_optimizer_state_(
        optimizer,
        factors,
        method=method,
        ratio=renewal.config.reset_ratio,
        mask=renewal.config.reset_mask,
        seed=renewal.seed,
        reset_step_count=renewal.config.reset_step_count,
    )


def _carry_(optimizer: Optimizer, factors: Factors, method: ResetMethod, renewal: Renewal) -> ResetReport:
    del method
    return transport_optimizer_state_(optimizer, factors, overlaps=renewal.overlaps)


STATE_POLICIES: dict[str, StatePolicy] = {**dict.fromkeys(RESET_METHODS, _clear_), "transport": _carry_}
NEEDS_OVERLAPS = frozenset({"transport"})
