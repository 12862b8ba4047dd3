"""The winner of a sweep, whether it lies on the edge of its grid, and what would extend the grid there."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from relora.lab.values import like, magnitude

Settings = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A point of a grid and the loss on the tuning split; infinite where the run diverged."""

    settings: Settings
    loss: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a sweep found."""

    winner: Tried
    edges: tuple[str, ...]
    """Axes on whose edge the winner lies: nothing beyond it was tried, so the optimum may lie further out."""


def choose(tried: Sequence[Tried]) -> Choice | None:
    """Return the point of the least loss, the first among equals; None if every one diverged."""
    best = min(tried, key=lambda point: point.loss, default=None)
    if best is None or not math.isfinite(best.loss):
        return None
    return Choice(winner=best, edges=tuple(axis for axis in best.settings if _is_edge(axis, best, tried)))


def beyond(choice: Choice, tried: Sequence[Tried], *, axes: Collection[str]) -> list[Settings]:
    """Return the points that extend a grid beyond its edges, one an axis: as far again as the last step.

    Args:
        choice: What has won so far.
        tried: All that has been tried.
        axes: Those that may be extended.
    """
    points: list[Settings] = []
    for axis in (edge for edge in choice.edges if edge in axes):
        value = choice.winner.settings[axis]
        here = magnitude(value)
        assert here is not None
        others = [number for number in _numbers(axis, tried) if number not in (0, here)]
        if others:
            nearest = min(others, key=lambda number: abs(math.log(number / here)))
            points.append({**choice.winner.settings, axis: like(value, here**2 / nearest)})
    return points


def _is_edge(axis: str, best: Tried, tried: Sequence[Tried]) -> bool:
    numbers = _numbers(axis, tried)
    here = magnitude(best.settings[axis])
    return here is not None and here > 0 and len(numbers) > 1 and here in (min(numbers), max(numbers))


def _numbers(axis: str, tried: Sequence[Tried]) -> set[float]:
    found = {magnitude(point.settings[axis]) for point in tried if axis in point.settings}
    return {number for number in found if number is not None and number >= 0}
