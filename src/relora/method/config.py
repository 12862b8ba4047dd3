"""ReLoRAConfig: every choice of the method in one frozen, validated value that does not need torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from relora.errors import ConfigError

Factors = Literal["both", "B"]
ScalingRule = Literal["auto", "alpha/r", "rslora", "matched", "learned"]
ResetMethod = Literal["zero", "random", "magnitude", "none", "transport"]
ResetMask = Literal["coupled", "separate"]
FactorInit = Literal["kaiming", "orthonormal", "cover", "columns", "gradient"]
Residual = Literal["none", "sign", "column", "muon"]
MergePrecision = Literal["float32", "native"]
Forward = Literal["auto", "factored", "effective"]
BaseDtype = Literal["keep", "bf16", "int8", "nf4"]
MasterPlace = Literal["device", "host"]

ALL_LINEAR: Literal["all-linear"] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class ReLoRAConfig:
    """How low-rank factors are shaped, trained, merged and restarted (paper sections 2 and 3).

    Raises:
        ConfigError: listing every field that is out of range, at once.
    """

    rank: int = 128
    """Rank r of one cycle's update; smaller than both sides of every target layer."""
    alpha: float | None = None
    """Numerator of the scaling, alpha / rank or alpha / sqrt(rank). None leaves the scaling to "auto", and
    with a rule that is named and needs it means scaling 1.0."""
    factors: Factors = "both"
    """Which factors train: "both" (the paper), or "B" with lora_A frozen and row-orthonormal in a cycle."""
    scaling_rule: ScalingRule = "auto"
    """"alpha/r", "rslora" (alpha / sqrt(rank)), "matched" (the step in W that full rank would make), or
    "learned" (one scalar a layer, starting at alpha / rank). "auto" is "alpha/r" where alpha is given and
    else "matched", which trained better (docs/method.md)."""
    kappa: float = 1.0
    """Multiplier of the "matched" scaling."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch only."""
    targets: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """"all-linear" (every linear layer but the output head), or fnmatch patterns on full module names."""
    exclude: tuple[str, ...] = ()
    """Fnmatch patterns of module names that are taken out of the targets again."""
    restart_every: int = 1000
    """Steps in a cycle, counted from the step of injection."""
    reset: ResetMethod = "magnitude"
    """What a restart does to the factors' optimizer state: "zero", "random", "magnitude", "none", or
    "transport" (factors="B"): carried into the new lora_A's coordinates."""
    reset_ratio: float = 0.99
    """Fraction of entries zeroed by "random" and "magnitude": round(ratio * numel) of each tensor."""
    reset_mask: ResetMask = "coupled"
    """"coupled": one mask for all moments of a tensor; "separate": one each, as in the authors' code."""
    reset_step_count: bool = False
    """Also set the optimizer's step count of the factors to 0, which restores Adam's bias correction."""
    init: FactorInit = "orthonormal"
    """How a new lora_A is drawn: "orthonormal" rows; "kaiming" (the paper: uniform, a = sqrt 5), which
    trained worse (docs/method.md); "cover", orthonormal blocks that cover the input space once a sweep;
    "columns", likewise with rows that each select one input, so that lora_B is the change of `rank` columns
    of the weight; "gradient", at restarts the top right-singular vectors of the base's gradient. With
    factors="B", "kaiming" means "orthonormal". lora_B always starts at 0."""
    init_mix: float = 0.0
    """Fraction of the rows of init="gradient" that are random, orthogonal to the others."""
    residual: Residual = "none"
    """A step on the gradient's part outside lora_A's rows (factors="B"): "sign" or "column", without a state,
    or "muon", with a momentum of 2 bytes a weight."""
    residual_scale: float = 1.0
    """Size of the residual's step, over that of the factors."""
    residual_every: int = 1
    """Every how many steps the residual is observed and stepped on, counted from the step of injection."""
    residual_layers: int | None = None
    """How many layers such a step takes, in turn and in a seeded order anew in each round; None takes all."""
    restart_growth: float = 1.0
    """Cycle k lasts round(restart_every * restart_growth^k) steps."""
    merge_precision: MergePrecision = "float32"
    """"float32" keeps what a low-precision base would round away; "native" loses it, and warns."""
    base_dtype: BaseDtype = "keep"
    """How the device holds the frozen base: as the model has it ("keep"), or in fewer bits, by which merges
    lose nothing: "bf16", "int8", "nf4" (with the bitsandbytes extra). fold gives the model's dtype back."""
    master: MasterPlace = "device"
    """Where the bits are that the base lacks of float32: beside it on the device, or in host memory, which
    only restarts and checkpoints read. The base is then all that the device holds of a frozen weight."""
    carry_base_error: bool = False
    """At restarts lora_B starts not at 0, but where the delta best cancels the error of a base of codes
    (base_dtype "int8" or "nf4")."""
    forward: Forward = "auto"
    """"effective" applies W + scaling * lora_B @ lora_A as one weight, "factored" base and factors one after
    the other; "auto" takes the one of fewer FLOPs, init="columns" left out. Dropout in training is always
    factored."""
    base_weight_decay: float = 0.0
    """Decoupled weight decay of the frozen base: a cycle's product of (1 - lr * decay) is applied at its
    restart."""

    def __post_init__(self) -> None:
        violations = self._violations()
        if violations:
            raise ConfigError.from_violations("ReLoRAConfig", violations)

    @property
    def scaling_rule_in_force(self) -> str:
        """The rule that "auto" stands for, or the one that was named."""
        if self.scaling_rule != "auto":
            return self.scaling_rule
        return "matched" if self.alpha is None else "alpha/r"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the recipe of the paper (rank 128, alpha 32, both factors, 99 % magnitude pruning).

        Args:
            **changes: Fields to set otherwise, `restart_every` above all: the paper's cycles differ by size.

        Raises:
            ConfigError: if a changed field is out of range.
        """
        recipe: dict[str, Any] = {
            "rank": 128,
            "alpha": 32.0,
            "factors": "both",
            "scaling_rule": "alpha/r",
            "init": "kaiming",
            "reset": "magnitude",
            "reset_ratio": 0.99,
            "reset_step_count": False,
        }
        return cls(**(recipe | changes))

    @classmethod
    def beyond(cls, *, rank: int, **changes: Any) -> Self:
        """Return this project's recipe beyond the paper's: cold, one-sided, with a step on the complement.

        lora_B alone trains, at half of full rank's learning rate; nothing is reset, no ramp follows a
        restart, and what lora_A cannot see moves by Muon's step, at 2.5 times full rank's rate. Measured at
        small sizes (docs/beyond.md).

        Args:
            rank: A quarter of the model's width, to begin with.
            **changes: Fields to set otherwise.

        Raises:
            ConfigError: if a changed field is out of range.
        """
        recipe: dict[str, Any] = {
            "factors": "B",
            "scaling_rule": "matched",
            "init": "orthonormal",
            "reset": "none",
            "restart_every": 50,
            "residual": "muon",
            "residual_scale": 5.0,
        }
        return cls(rank=rank, **(recipe | changes))

    @property
    def factor_init(self) -> FactorInit:
        """The initialisation in force: a frozen lora_A is always row-orthonormal."""
        return "orthonormal" if self.factors == "B" and self.init == "kaiming" else self.init

    def _violations(self) -> list[str]:
        return [
            *_integer("rank", self.rank, least=1),
            *([] if self.alpha is None else _number("alpha", self.alpha, above=0.0)),
            *_choice("factors", self.factors, get_args(Factors)),
            *_choice("scaling_rule", self.scaling_rule, get_args(ScalingRule)),
            *_number("kappa", self.kappa, above=0.0),
            *_number("dropout", self.dropout, least=0.0, below=1.0),
            *_targets(self.targets),
            *_patterns("exclude", self.exclude),
            *_integer("restart_every", self.restart_every, least=1),
            *_choice("reset", self.reset, get_args(ResetMethod)),
            *_number("reset_ratio", self.reset_ratio, least=0.0, most=1.0),
            *_choice("reset_mask", self.reset_mask, get_args(ResetMask)),
            *_boolean("reset_step_count", self.reset_step_count),
            *_choice("init", self.init, get_args(FactorInit)),
            *_number("init_mix", self.init_mix, least=0.0, most=1.0),
            *_choice("residual", self.residual, get_args(Residual)),
            *_number("residual_scale", self.residual_scale, above=0.0),
            *_integer("residual_every", self.residual_every, least=1),
            *(
                []
                if self.residual_layers is None
                else _integer("residual_layers", self.residual_layers, least=1)
            ),
            *_number("restart_growth", self.restart_growth, above=0.0),
            *_choice("merge_precision", self.merge_precision, get_args(MergePrecision)),
            *_choice("base_dtype", self.base_dtype, get_args(BaseDtype)),
            *_choice("master", self.master, get_args(MasterPlace)),
            *_boolean("carry_base_error", self.carry_base_error),
            *self._storage(),
            *_choice("forward", self.forward, get_args(Forward)),
            *_number("base_weight_decay", self.base_weight_decay, least=0.0),
            *self._unfit_together(),
        ]

    def _storage(self) -> list[str]:
        problems = []
        if self.base_dtype in ("int8", "nf4") and self.master != "host":
            problems.append(
                f"base_dtype={self.base_dtype!r} needs master='host': a merge into the codes alone is lost"
            )
        if self.carry_base_error is True and self.base_dtype not in ("int8", "nf4"):
            problems.append(
                f"carry_base_error must be false with base_dtype={self.base_dtype!r}: only codes have an "
                "error worth it"
            )
        if self.merge_precision == "native" and (self.base_dtype != "keep" or self.master == "host"):
            problems.append(
                "merge_precision='native' keeps no master: base_dtype must be 'keep' and master 'device'"
            )
        return problems

    def _unfit_together(self) -> list[str]:
        violations = []
        if self.factors != "B" and self.residual in ("sign", "column", "muon"):
            violations.append(
                "residual must be 'none' unless factors='B': lora_A must be frozen and orthonormal to have a "
                "complement"
            )
        if self.factors != "B" and self.reset == "transport":
            violations.append(
                "reset must not be 'transport' unless factors='B': a lora_A that trains leaves nothing exact "
                "to carry"
            )
        if self.reset == "transport" and self.reset_step_count:
            violations.append("reset_step_count must be false with reset='transport', which keeps moments")
        return violations


def _integer(name: str, value: object, *, least: int) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{name} must be a whole number, not {value!r}"]
    return [] if value >= least else [f"{name} must be at least {least}, not {value}"]


def _number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"{name} must be a finite number, not {value!r}"]
    if least <= value <= most and above < value < below:
        return []
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    return [f"{name} must be {wanted}, not {value:g}"]


def _boolean(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name} must be true or false, not {value!r}"]


def _choice(name: str, value: object, choices: Collection[str]) -> list[str]:
    if isinstance(value, str) and value in choices:
        return []
    return [f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}"]


def _targets(value: object) -> list[str]:
    if value == ALL_LINEAR:
        return []
    if isinstance(value, str):
        return [f"targets must be 'all-linear' or a tuple of patterns: write ({value!r},), not {value!r}"]
    return _patterns("targets", value) or ([] if value else ["targets must not be empty"])


def _patterns(name: str, value: object) -> list[str]:
    if isinstance(value, tuple) and all(isinstance(pattern, str) for pattern in value):
        return []
    return [f"{name} must be a tuple of patterns, not {value!r}"]
