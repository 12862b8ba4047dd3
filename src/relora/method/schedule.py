"""When restarts happen and what the learning rate does about them: pure functions of the step.

One calendar serves both, so that a merge and its learning-rate drop cannot drift apart. Cycle k lasts
round(restart_every * restart_growth^k) steps from `start`, the step of injection. With T = total_steps,
w0 = warmup_steps, w = rewarmup_steps, m = min_ratio, and t updates done (paper section 3, the authors'
`cosine_restarts`):

    C(x) = m + (1 - m) / 2 * (1 + cos(pi * (x - w0) / (T - w0)))      base(x) = x / w0 below w0, else C(x)
    t in the first w updates of a cycle begun at b:   (t - b) / w * base(min(b + w, T))
    otherwise:                                        base(t)

The ramp ends on the cosine and never climbs above it. The very first cycle of a run has no ramp; a switch
at `start` > 0 has one, like any restart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from relora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Which steps end a cycle."""

    restart_every: int
    restart_growth: float = 1.0
    start: int = 0
    end: int | None = None
    """The last step of the run; no restart falls on it."""
    last_restart: int | None = None
    """No restart falls later than this; the cycle it begins lasts to the end."""

    def __post_init__(self) -> None:
        violations = _calendar_violations(self.restart_every, self.restart_growth, self.start)
        if self.end is not None and self.end < self.start:
            violations.append(f"end must be start {self.start} or later, not {self.end}")
        if violations:
            raise ConfigError.from_violations("restart calendar", violations)

    def cycle_start(self, updates_done: int) -> int:
        """Return the step at which the cycle of the next update began: `start`, then each restart; 0 before
        `start`.
        """
        if updates_done < self.start:
            return 0
        counted = max(self.start, self._counted(updates_done))
        if self.restart_growth == 1.0:
            return counted - (counted - self.start) % self.restart_every
        begun = self.start
        for boundary in self._boundaries():
            if boundary > counted:
                break
            begun = boundary
        return begun

    def restarts_at(self, step: int) -> bool:
        """Tell whether a restart follows update `step`; none falls on `end`, the last step."""
        return self.start < step == self.cycle_start(step) and step != self.end

    def restarts_until(self, last_step: int) -> tuple[int, ...]:
        """Return every restart step up to and including `last_step`, in order."""
        steps = []
        for boundary in self._boundaries():
            if boundary > self._counted(last_step):
                break
            steps.append(boundary)
        return tuple(step for step in steps if step != self.end)

    def _counted(self, step: int) -> int:
        return step if self.last_restart is None else min(step, self.last_restart)

    def _boundaries(self) -> Iterator[int]:
        boundary, cycle = self.start, 0
        while True:
            boundary += max(1, round(self.restart_every * self.restart_growth**cycle))
            cycle += 1
            yield boundary


def jagged_cosine(
    updates_done: int,
    *,
    total_steps: int,
    warmup_steps: int,
    restart_every: int,
    rewarmup_steps: int,
    min_ratio: float = 0.1,
    start: int = 0,
    restart_growth: float = 1.0,
    last_restart: int | None = None,
) -> float:
    """Return the learning-rate multiplier of the update that follows `updates_done` updates.

    Args:
        updates_done: From 0; below `total_steps`, where the last update is reached.
        total_steps: Length of the run in updates, the full-rank phase included.
        warmup_steps: Linear ramp at the start of the run.
        restart_every: Length of the first cycle.
        rewarmup_steps: Linear ramp after each restart; 0 leaves a plain cosine.
        min_ratio: The cosine's end.
        start: Updates before injection; they follow the cosine without restarts.
        restart_growth: Growth of the cycles, as in ReLoRAConfig.
        last_restart: No restart falls later than this step, as for ReLoRA.

    Returns:
        A fraction of the peak learning rate, exactly 0 for the first update after a restart.

    Raises:
        ConfigError: for arguments out of range, listed all at once.
    """
    violations = _schedule_violations(total_steps, warmup_steps, rewarmup_steps, min_ratio)
    violations += _calendar_violations(restart_every, restart_growth, start)
    if not 0 <= updates_done <= total_steps:
        violations.append(f"updates_done must be within 0 to {total_steps}, not {updates_done}")
    if violations:
        raise ConfigError.from_violations("jagged_cosine", violations)

    def base(position: int) -> float:
        if position < warmup_steps:
            return position / warmup_steps
        progress = (position - warmup_steps) / max(1, total_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    calendar = Calendar(
        restart_every=restart_every, restart_growth=restart_growth, start=start, last_restart=last_restart
    )
    begun = calendar.cycle_start(updates_done)
    ramped = updates_done - begun
    if 0 < begun <= updates_done and ramped < rewarmup_steps:
        return ramped / rewarmup_steps * base(min(begun + rewarmup_steps, total_steps))
    return base(updates_done)


class JaggedCosineLR(LRScheduler):
    """`jagged_cosine` as a torch learning-rate scheduler: call `step()` after every optimizer step.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        total_steps: As for `jagged_cosine`, and so are the others.
        last_epoch: As for every torch scheduler: updates done, less 1, where a run goes on; the groups must
            then name their peaks as "initial_lr". -1 starts a run.

    Raises:
        ConfigError: for arguments out of range, or a step past `total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        warmup_steps: int,
        restart_every: int,
        rewarmup_steps: int,
        min_ratio: float = 0.1,
        start: int = 0,
        restart_growth: float = 1.0,
        last_restart: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.restart_every = restart_every
        self.rewarmup_steps = rewarmup_steps
        self.min_ratio = min_ratio
        self.start = start
        self.restart_growth = restart_growth
        self.last_restart = last_restart
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return each group's learning rate for the next update."""
        multiplier = jagged_cosine(
            self.last_epoch,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            restart_every=self.restart_every,
            rewarmup_steps=self.rewarmup_steps,
            min_ratio=self.min_ratio,
            start=self.start,
            restart_growth=self.restart_growth,
            last_restart=self.last_restart,
        )
        return [peak * multiplier for peak in self.base_lrs]


def _calendar_violations(restart_every: int, restart_growth: float, start: int) -> list[str]:
    violations = []
    if restart_every < 1:
        violations.append(f"restart_every must be at least 1, not {restart_every}")
    if not 0 < restart_growth < math.inf:
        violations.append(f"restart_growth must be above 0 and finite, not {restart_growth}")
    if start < 0:
        violations.append(f"start must be at least 0, not {start}")
    return violations


def _schedule_violations(
    total_steps: int, warmup_steps: int, rewarmup_steps: int, min_ratio: float
) -> list[str]:
    violations = []
    if total_steps < 1:
        violations.append(f"total_steps must be at least 1, not {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        violations.append(f"warmup_steps must be within 0 to total_steps {total_steps}, not {warmup_steps}")
    if rewarmup_steps < 0:
        violations.append(f"rewarmup_steps must be at least 0, not {rewarmup_steps}")
    if not 0 <= min_ratio <= 1:
        violations.append(f"min_ratio must be within 0 to 1, not {min_ratio}")
    return violations
