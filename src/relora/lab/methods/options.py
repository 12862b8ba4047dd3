"""The [method] sections of the laboratory's methods: what a recipe may set, without torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from relora.train.checks import unmet
from relora.train.config import Recipe
from relora.train.methods import MethodOptions

Defect = Literal[
    "dead_first_cycle",
    "random_reset",
    "keep_step_count",
    "native_merge",
    "late_merge",
    "separate_masks",
]


@dataclass(frozen=True, kw_only=True)
class MuonOptions(MethodOptions):
    """Muon on the hidden matrices at optim.lr; AdamW on embeddings, head, norms and biases."""

    momentum: float = 0.95
    """Decay of Muon's momentum."""
    adamw_lr: float | None = None
    """Peak learning rate of what AdamW trains; none means optim.lr."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        fits = 0 <= self.momentum < 1
        return [
            *unmet((fits, f"momentum must be at least 0 and below 1, not {self.momentum:g}")),
            *_violations_of_adamw_lr(self.adamw_lr),
        ]


@dataclass(frozen=True, kw_only=True)
class InPlaceOptions(MethodOptions):
    """Muon on the hidden matrices at optim.lr, without a gradient of them; AdamW on the rest."""

    adamw_lr: float | None = None
    """Peak learning rate of what AdamW trains; none means optim.lr."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return _violations_of_adamw_lr(self.adamw_lr)

    def cross_violations(self, recipe: "Recipe") -> list[str]:
        """Refuse what cannot see gradients go by."""
        return unmet((not recipe.train.compile, "train.compile must be false: muon-in-place is eager only"))


def _violations_of_adamw_lr(rate: float | None) -> list[str]:
    return unmet((rate is None or rate > 0, f"adamw_lr must be above 0, not {rate}"))


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(MuonOptions):
    """Normalised gradients without memory on every matrix at optim.lr, the output head's with momentum; AdamW
    on norms and biases (after SCALE, arXiv 2506.16659).
    """

    momentum: float = 0.9
    """Decay of the output head's momentum."""


@dataclass(frozen=True, kw_only=True)
class ControlOptions(MethodOptions):
    """A smaller model of the same depth, all of it trained, with as many parameters as ReLoRA trains."""

    parameters: int | None = None
    """Parameters of the small model; none counts what the [relora] section would train of the large one."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (
                self.parameters is None or self.parameters > 0,
                f"parameters must be above 0, not {self.parameters}",
            )
        )

    def cross_violations(self, recipe: Recipe) -> list[str]:
        """A checkpoint has its size already."""
        return unmet(
            (recipe.model.init_from is None, 'model.init_from has no control: "control" chooses its own size')
        )


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(MethodOptions):
    """Adam on the gradient's projection onto relora.rank of its directions (arXiv 2403.03507).

    The projected matrices are the targets of the [relora] section; their learning rate is optim.factor_lr.
    """

    refresh_every: int = 200
    """Steps between two projectors."""
    scale: float = 0.25
    """Multiplier of the update that is projected back."""
    projector: Literal["svd", "randomised"] = "svd"
    """"svd": the gradient's leading singular vectors; "randomised": the same by a random range finder."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (self.refresh_every >= 1, f"refresh_every must be at least 1, not {self.refresh_every}"),
            (self.scale > 0, f"scale must be above 0, not {self.scale:g}"),
        )


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(MethodOptions):
    """ReLoRA that merges more often than it resets: relora.restart_every is the reset's period, with its
    learning-rate drop; merges in between keep the optimizer's state (paper, Table 5).
    """

    merge_every: int = 100
    """Steps between two merges, counted from the switch."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet((self.merge_every >= 1, f"merge_every must be at least 1, not {self.merge_every}"))


@dataclass(frozen=True, kw_only=True)
class SwitchOptions(MethodOptions):
    """Restarts of single vectors: each step a few pairs (a row of lora_A, a column of lora_B) are merged and
    begun anew, with their own optimizer state and step count (after arXiv 2406.06564).
    """

    interval: float = 40.0
    """Steps between two switches of a pair on average, at the switch of phases."""
    third_at: float = 0.1
    """Fraction of the low-rank phase after which switches are a third as frequent (exponential decay)."""
    freeze_steps: int = 5
    """Steps for which a new row of lora_A waits, while its column of lora_B, at 0, begins."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (self.interval >= 1, f"interval must be at least 1, not {self.interval:g}"),
            (self.third_at > 0, f"third_at must be above 0, not {self.third_at:g}"),
            (self.freeze_steps >= 0, f"freeze_steps must be at least 0, not {self.freeze_steps}"),
        )

    def cross_violations(self, recipe: Recipe) -> list[str]:
        """Both factors move, and the scaling does not."""
        relora = recipe.relora
        return unmet(
            (relora.factors == "both", f'relora.factors must be "both", not {relora.factors!r}'),
            (relora.scaling_rule != "learned", 'relora.scaling_rule must not be "learned"'),
            (relora.merge_precision == "float32", 'relora.merge_precision must be "float32"'),
        )


@dataclass(frozen=True, kw_only=True)
class AsPublishedOptions(MethodOptions):
    """ReLoRA with chosen defects of the authors' code at its last commit (docs/method.md lists them)."""

    defects: tuple[Defect, ...] = get_args(Defect)
    """Which defects; none of them is ReLoRA with relora.reset, one mask, and step counts reset to 0."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return unmet(
            (
                len(set(self.defects)) == len(self.defects),
                f"defects must not be named twice: {', '.join(self.defects)}",
            )
        )

    def cross_violations(self, recipe: Recipe) -> list[str]:
        """The defects decide what they stand for; the [relora] section must not say otherwise."""
        relora = recipe.relora
        return unmet(
            (relora.factors == "both", f'relora.factors must be "both", not {relora.factors!r}'),
            (relora.scaling_rule != "learned", 'relora.scaling_rule must not be "learned"'),
            (
                relora.reset != "none",
                'relora.reset must not be "none": a reset without its defects needs a method',
            ),
            (
                "separate_masks" in self.defects or relora.reset_mask == "coupled",
                'relora.reset_mask is decided by the defect "separate_masks": leave it "coupled"',
            ),
            (
                not relora.reset_step_count,
                'relora.reset_step_count is decided by the defect "keep_step_count": leave it false',
            ),
            (
                relora.merge_precision == "float32",
                'relora.merge_precision is decided by the defect "native_merge": leave it "float32"',
            ),
        )
