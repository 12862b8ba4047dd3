"""The scaling of a layer's delta: scaling * lora_B @ lora_A.

"matched" follows from the size of a step. One Adam step moves every entry of lora_B by about the learning
rate, hence the weight by an RMS of `scaling * lr * sqrt(rank) * rms(lora_A)`; a full-rank Adam step moves it
by `lr`. Equal steps need `scaling = 1 / (sqrt(rank) * rms(lora_A))`: sqrt(in_features / rank) for orthonormal
rows, sqrt(3 in_features / rank) for Kaiming. The paper's alpha/rank = 0.25 is 7 to 14 times smaller, so its
factors need a learning rate that much larger than full rank's.
"""

import math
from collections.abc import Callable

from relora.method.config import ReLoRAConfig
from relora.method.factor_init import FACTOR_INITS


def _alpha_over_rank(config: ReLoRAConfig, in_features: int) -> float:
    del in_features
    return 1.0 if config.alpha is None else config.alpha / config.rank


def _rank_stabilised(config: ReLoRAConfig, in_features: int) -> float:
    del in_features
    return 1.0 if config.alpha is None else config.alpha / math.sqrt(config.rank)


def _matched(config: ReLoRAConfig, in_features: int) -> float:
    rms = FACTOR_INITS[config.factor_init].rms(in_features)
    return config.kappa / (math.sqrt(config.rank) * rms)


SCALING_RULES: dict[str, Callable[[ReLoRAConfig, int], float]] = {
    "alpha/r": _alpha_over_rank,
    "rslora": _rank_stabilised,
    "matched": _matched,
    "learned": _alpha_over_rank,
}


def initial_scaling(config: ReLoRAConfig, *, in_features: int) -> float:
    """Return the scaling of a layer with `in_features` inputs; for "learned", where it starts."""
    return SCALING_RULES[config.scaling_rule_in_force](config, in_features)
