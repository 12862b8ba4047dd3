"""When a warm start has done its work: a rule on the losses of its steps (warm_start_until "plateau").

The losses after the first warm-up are averaged over windows of a twentieth of the longest warm start. After
each window, from the fifth on, the fall of the last two, a window, is held against the mean fall of all:

    (m[k-2] - m[k]) / 2  <  1/2 (m[0] - m[k]) / k     ends it

that is, where the curve has become half as steep as it was on the whole. It is a pure function of the means,
which checkpoints keep, and the losses are those of all ranks, so every rank and a resumed run end alike.
"""

from collections.abc import Sequence
from statistics import fmean

_WINDOWS = 20
_LEAST_WINDOWS = 5
_STEEPNESS = 0.5


def window_steps(longest: int) -> int:
    """Return the steps of a window of a warm start of at most so many steps."""
    return max(1, longest // _WINDOWS)


def least_steps(longest: int) -> int:
    """Return the steps after the warm-up before which the rule cannot end a warm start."""
    return _LEAST_WINDOWS * window_steps(longest)


def steepness(means: Sequence[float]) -> float | None:
    """Return the fall of a loss in the last windows over that of all, a window; None for too few.

    Args:
        means: Of the windows so far. A loss that has not fallen at all has a steepness of 0.
    """
    if len(means) < _LEAST_WINDOWS:
        return None
    overall = (means[0] - means[-1]) / (len(means) - 1)
    return (means[-3] - means[-1]) / 2 / overall if overall > 0 else 0.0


def take_loss_(means: list[float], pending: list[float], loss: float, *, longest: int) -> float | None:
    """Take note of the loss of a step of a warm start.

    Args:
        means: Of the windows so far; changed in place.
        pending: Losses of the window that is open; changed in place.
        loss: Of the step.
        longest: Most steps of the warm start.

    Returns:
        The steepness, if the warm start ends with this step; else None.
    """
    pending.append(loss)
    if len(pending) < window_steps(longest):
        return None
    means.append(fmean(pending))
    pending.clear()
    found = steepness(means)
    return found if found is not None and found < _STEEPNESS else None
