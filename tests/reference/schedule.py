"""The jagged cosine written down twice more, sharing nothing with src: as the authors' code has it (their
`cosine_restarts`, paper.md 1.5), and as a walk through the cycles for what this project adds (start, growth,
remainder cycles, a ramp cut off by the end of the run).
"""

import numpy as np


def authors_multiplier(t, *, total, first_warmup, restart_warmup, cycle, min_ratio):
    def cosine(x):
        return min_ratio + (1 - min_ratio) * 0.5 * (
            1 + np.cos(np.pi * (x - first_warmup) / (total - first_warmup))
        )

    if t < first_warmup:
        return t / first_warmup
    k, j = divmod(t, cycle)
    if j < restart_warmup and t >= cycle:
        return j / restart_warmup * cosine(k * cycle + restart_warmup)
    return cosine(t)


def cycle_lengths(cycle, growth):
    k = 0
    while True:
        yield max(1, round(cycle * growth**k))
        k += 1


def restart_steps(*, cycle, growth=1.0, start=0, last, last_restart=None):
    last = last if last_restart is None else min(last, last_restart)
    steps, at = [], start
    for length in cycle_lengths(cycle, growth):
        at += length
        if at > last:
            return steps
        steps.append(at)
    return steps


def plain_cosine(*, total, warmup, min_ratio):
    """Values at 0 .. total."""
    t = np.arange(total + 1)
    phase = (t - warmup) / max(1, total - warmup)
    cosine = min_ratio + (1 - min_ratio) * (1 + np.cos(np.pi * phase)) / 2
    return np.where(t < warmup, t / max(1, warmup), cosine)


def jagged_multipliers(*, total, warmup, cycle, rewarmup, min_ratio, start=0, growth=1.0, last_restart=None):
    """Values at 0 .. total: the plain cosine, a ramp laid over the head of each cycle but a run's first."""
    plain = plain_cosine(total=total, warmup=warmup, min_ratio=min_ratio)
    values = plain.copy()
    restarts = restart_steps(cycle=cycle, growth=growth, start=start, last=total, last_restart=last_restart)
    begins = [start, *restarts]
    ends = [*begins[1:], total + 1]
    for begin, end in zip(begins, ends, strict=True):
        if begin == 0:
            continue
        target = plain[min(begin + rewarmup, total)] if begin <= total else 0.0
        for t in range(begin, min(end, begin + rewarmup, total + 1)):
            values[t] = target * (t - begin) / rewarmup
    return values
