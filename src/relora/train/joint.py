"""Several optimizers that look like one: a run keeps one list of groups and one state, whoever steps what."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.optim import Muon, Optimizer

Groups = list[dict[str, Any]]


class JointOptimizer(Optimizer):
    """Steps each part on its own groups; groups and states are shared, so that checkpoints and learning rates
    see one optimizer.

    Args:
        parts: For each optimizer, its groups and what makes it from them.

    Attributes:
        parts: The optimizers, for whom must know which of them keeps what state.
    """

    def __init__(self, parts: Sequence[tuple[Groups, Callable[[Groups], Optimizer]]]) -> None:
        self.parts = tuple(make(groups) for groups, make in parts if groups)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # torch copies no group that is complete, but does not promise it: the parts must hold the same dicts.
        remaining = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(remaining) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part."""
        assert closure is None
        for part in self.parts:
            cast(Any, part).step()
        return None


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that step: the parts of a joint one, else the optimizer itself."""
    return optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,)


def matched_muon(groups: Groups, *, momentum: float = 0.95) -> Optimizer:
    """Return Muon whose update has about the RMS of AdamW's at the same learning rate.

    The update is 0.2 sqrt(max(m, n)) times the orthogonalised momentum (m, n): RMS 0.2, up to Newton and
    Schulz's error. For lora_B (out, rank) that is a step in W of RMS 0.2 lr scaling sqrt(rank) rms(lora_A),
    since an orthonormal factor keeps the norm of what it multiplies: 0.2 kappa lr with scaling "matched".

    Args:
        groups: Of matrices, each with its learning rate and weight decay.
        momentum: Decay of the momentum (Nesterov's).
    """
    return Muon(groups, momentum=momentum, adjust_lr_fn="match_rms_adamw")
