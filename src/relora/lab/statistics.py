"""Mean, spread, and the paired difference with Student's confidence interval; nothing beyond that is claimed.

Seeds pair runs: the same seed has the same initial weights and the same batches in the same order under every
method, so a difference is taken seed by seed, d_i = loss_i - reference_i, and its interval is

    mean(d) +- t(0.975; n - 1) sd(d) / sqrt(n)

It speaks of other seeds on the same text, not of other texts, sizes or settings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for a single measurement."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference and its confidence interval."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    """Ends of the 95 % confidence interval; None for a single pair."""
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation of at least one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Spread(n=n, mean=mean, sd=None)
    return Spread(n=n, mean=mean, sd=math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return values - reference over the seeds that both have; None if they share none.

    Args:
        values: By seed.
        reference: By seed.
    """
    differences = [values[seed] - reference[seed] for seed in sorted(values) if seed in reference]
    if not differences:
        return None
    found = spread(differences)
    if found.sd is None:
        return Difference(n=1, mean=found.mean, sd=None, low=None, high=None)
    half = t_quantile((1 + CONFIDENCE) / 2, found.n - 1) * found.sd / math.sqrt(found.n)
    return Difference(n=found.n, mean=found.mean, sd=found.sd, low=found.mean - half, high=found.mean + half)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t stays below with a probability from 0.5 to below 1."""
    assert 0.5 <= probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """Return P(T <= t) for t >= 0: 1 - I(v / (v + t^2); v/2, 1/2) / 2."""
    return 1 - _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function, by the continued fraction that converges."""
    if x in (0.0, 1.0):
        return x
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(x, a, b) / a
    return 1 - front * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
