"""Which restarts hurt: the loss after a restart's re-warm against the loss before it.

A restart changes no function, so the loss should go on where it was once the learning rate is back. It is
said to hurt where the mean of the first losses after the re-warm lies above the mean of the last ones before
the restart by more than chance does:

    after - before > max(3 sqrt(var_before / n_before + var_after / n_after), 0.01 nat)

It costs nothing: the losses are those that the step has read anyway.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from relora.errors import CheckpointError

MOST_STEPS = 20
_ENOUGH_STEPS = 4
_SIGMAS = 3.0
_LEAST_NATS = 0.01


@dataclass(frozen=True, kw_only=True)
class RestartEffect:
    """What became of the loss at one restart."""

    step: int
    """The restart's."""
    loss_before: float
    loss_after: float
    loss_noise: float | None
    """Standard error of the difference; None where there are too few losses to tell."""

    @property
    def hurt(self) -> bool | None:
        """Whether the loss rose by more than chance does; None where there are too few losses to tell."""
        if self.loss_noise is None:
            return None
        return self.loss_after - self.loss_before > max(_SIGMAS * self.loss_noise, _LEAST_NATS)

    def as_dict(self) -> dict[str, Any]:
        """Return what joins the restart's line in restarts.jsonl."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "loss_noise": self.loss_noise,
            "hurt": self.hurt,
        }


class RestartWatch:
    """Sees the loss of every step and tells, a while after each restart, what it did.

    Args:
        restart_every: Steps of the shortest cycle.
        rewarmup_steps: Steps after a restart that do not count.
    """

    def __init__(self, *, restart_every: int, rewarmup_steps: int) -> None:
        self._rewarmup = rewarmup_steps
        self._window = max(min(MOST_STEPS, (restart_every - rewarmup_steps) // 2), 1)
        self._recent: list[float] = []
        self._restart_step: int | None = None
        self._before: list[float] = []
        self._after: list[float] = []

    def loss(self, step: int, loss: float) -> RestartEffect | None:
        """Take the loss of a step; return what the last restart did, once that can be told."""
        if self._restart_step is not None and step <= self._restart_step + self._rewarmup:
            return None
        self._recent = [*self._recent, loss][-self._window :]
        if not self._before:
            return None
        self._after.append(loss)
        return self.conclude() if len(self._after) == self._window else None

    def restarted(self, step: int) -> RestartEffect | None:
        """Take note of a restart after `step`; return what the one before did, if that was still open."""
        earlier = self.conclude()
        self._restart_step, self._before, self._recent = step, self._recent, []
        return earlier

    def conclude(self) -> RestartEffect | None:
        """Return what the last restart did, from what losses there are; None if there are none."""
        before, after, step = self._before, self._after, self._restart_step
        self._before, self._after = [], []
        if not before or not after or step is None:
            return None
        noise = None
        if min(len(before), len(after)) >= _ENOUGH_STEPS:
            noise = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
        return RestartEffect(step=step, loss_before=fmean(before), loss_after=fmean(after), loss_noise=noise)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return {
            "recent": list(self._recent),
            "restart_step": self._restart_step,
            "before": list(self._before),
            "after": list(self._after),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CheckpointError: if it is something else; nothing has changed then.
        """
        losses = [state.get(name) for name in ("recent", "before", "after")]
        step = state.get("restart_step")
        fits = all(isinstance(values, list) and all(type(x) is float for x in values) for values in losses)
        if set(state) != set(self.state_dict()) or not fits or not (step is None or type(step) is int):
            raise CheckpointError("the losses around the last restart are missing or malformed")
        self._recent, self._before, self._after = (list(values or ()) for values in losses)
        self._restart_step = step
