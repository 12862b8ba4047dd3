"""What the two ways to apply a low-rank layer cost (module `forward`), and which costs less.

For T tokens and a weight of (m, n) at rank r, in FLOPs of forward and backward together:

    factored    4Tmn + 6Tr(m + n)              one-sided  4Tmn + 2Tr(2n + 3m)
    effective   4Tmn + 4Tr(m + n) + 4mnr       one-sided  4Tmn + 2Tr(n + m) + 4mnr

against 6Tmn at full rank. Where each row of A selects one input (init="columns"), a product with A is a
gather or an addition to r columns, and neither path pays for it:

    factored    4Tmn + 6Trm                    effective  4Tmn + 2Trm
"""

from typing import Literal


def layer_flops(
    path: Literal["factored", "effective"],
    tokens: int,
    *,
    out_features: int,
    in_features: int,
    rank: int,
    one_sided: bool,
    selects: bool = False,
) -> int:
    """Return the FLOPs of a forward and backward by a path; `selects` where lora_A selects inputs."""
    m, n = out_features, in_features
    forming = 0
    if path == "factored":
        sides = 3 * m if selects else 2 * n + 3 * m if one_sided else 3 * (n + m)
    else:
        sides = m if selects else n + m if one_sided else 2 * (n + m)
        forming = 0 if selects else 4 * m * n * rank
    return 4 * tokens * m * n + 2 * tokens * rank * sides + forming


def least_tokens(*, out_features: int, in_features: int, one_sided: bool) -> int:
    """Return the number of tokens from which on the effective weight costs fewer FLOPs; the rank cancels.
    Where lora_A selects inputs it always does, but is a copy of the weight to make: the same number serves.

    One number for training and evaluation alike, so that a recomputed forward takes the path of the first,
    and a compiled model with varying lengths has two graphs at most for each.
    """
    m, n = out_features, in_features
    return 2 * m * n // (n + 2 * m if one_sided else n + m) + 1
