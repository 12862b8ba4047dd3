"""Two optimizers that look like one: a run keeps one list of groups and one state, whoever steps what."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class JointOptimizer(Optimizer):
    """Steps each part on its own groups; groups and states are shared, so that checkpoints and learning rates
    see one optimizer.

    Args:
        parts: For each optimizer, its groups and what makes it from them.
    """

    def __init__(self, parts: Sequence[tuple[Groups, Callable[[Groups], Optimizer]]]) -> None:
        self._parts = [make(groups) for groups, make in parts if groups]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # torch copies no group that is complete, but does not promise it: the parts must hold the same dicts.
        remaining = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(remaining) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part."""
        assert closure is None
        for part in self._parts:
            cast(Any, part).step()
        return None
