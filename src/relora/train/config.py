"""A run in one value: the sections of a recipe, each right by itself and all of them together.

Sections stand beside their owners and say what is wrong with them (`violations`); a `Recipe` that exists has
no violation in it, nor between its sections.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from relora.checkpoint.config import CheckpointConfig
from relora.data.config import TRAIN_BPE, DataConfig
from relora.errors import ConfigError
from relora.log.config import LogConfig
from relora.method.config import ALL_LINEAR
from relora.train.architecture import ModelConfig
from relora.train.checks import section_violations, type_problems, unmet
from relora.train.methods import MethodOptions, MethodSpec, method_spec, options_violations, require_method
from relora.train.plateau import least_steps
from relora.train.sections import (
    DistributedConfig,
    EvalConfig,
    OptimConfig,
    ReLoRASection,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LogConfig",
    "MethodOptions",
    "ModelConfig",
    "OptimConfig",
    "ReLoRASection",
    "Recipe",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is made of.

    Raises:
        ConfigError: listing every violation of every section, and between sections, at once.
    """

    run: RunConfig = field(default_factory=RunConfig)
    method: MethodOptions = field(default_factory=MethodOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    relora: ReLoRASection = field(default_factory=ReLoRASection)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        sections = vars(self)
        violations = section_violations(sections)
        if not any(type_problems(section) for section in sections.values()):
            violations += self._cross_violations()
        if violations:
            raise ConfigError.from_violations("recipe", violations)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step, over all devices."""
        return self.train.batch_size * self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: train.steps, or as many whole ones as train.tokens pays for."""
        if self.train.steps is not None:
            return self.train.steps
        return (self.train.tokens or 0) // self.tokens_per_step

    def is_due(self, step: int, every: int) -> bool:
        """Tell whether a step is one of every so many (0: none), or the last."""
        return step == self.total_steps or (every > 0 and step % every == 0)

    @property
    def switch_step(self) -> int | None:
        """The step after which the model trains at low rank (0: from the first), or None if it never does."""
        return self.relora.warm_start_steps if self.spec.has_switch else None

    @property
    def spec(self) -> MethodSpec:
        """What is known of run.method."""
        return require_method(self.run.method)

    @property
    def options(self) -> MethodOptions:
        """The [method] section, or its defaults where a recipe built by hand has none."""
        kind = self.spec.options
        return self.method if isinstance(self.method, kind) else kind()

    def _cross_violations(self) -> list[str]:
        """Check sections against each other, as far as each can be compared."""
        if method_spec(self.run.method) is None:
            return []
        low_rank = self.spec.has_switch
        return [
            *options_violations(self),
            *self._length_violations(),
            *self._position_violations(),
            *unmet(
                (
                    self.eval.split == "heldout" or self.data.tuning_fraction > 0,
                    'data.tuning_fraction must be above 0 with eval.split "tuning"',
                )
            ),
            *self._tokenizer_violations(),
            *self._variant_violations(),
            *(self._rank_violations() if low_rank else []),
            *self._compile_violations(),
        ]

    def _length_violations(self) -> list[str]:
        """Compare the phases of the run with its length."""
        given = self.train.steps if self.train.steps is not None else self.train.tokens
        if given is None or given < 1 or self.tokens_per_step < 1:
            return []
        steps = self.total_steps
        if steps < 1:
            return [f"train.tokens must be at least the {self.tokens_per_step} of one step, not {given}"]
        warm_start, cycle = self.relora.warm_start_steps, self.relora.restart_every
        warmup, rewarmup = self.schedule.warmup_steps, self.schedule.rewarmup_steps
        shortest = _shortest_cycle(cycle, self.relora.restart_growth, steps - warm_start)
        low_rank = self.spec.has_switch
        restarts = self.spec.restarts and warm_start < steps
        length = f"the {steps} steps of the run"
        return unmet(
            (warmup < steps, f"schedule.warmup_steps must be less than {length}, not {warmup}"),
            (
                warm_start < steps or not low_rank,
                f"relora.warm_start_steps must be less than {length}, not {warm_start}",
            ),
            (
                self.relora.warm_start_until == "steps"
                or not low_rank
                or warmup + least_steps(warm_start) < warm_start,
                f"relora.warm_start_steps must be above {warmup + least_steps(warm_start)} with "
                'relora.warm_start_until "plateau", which looks at '
                f"{least_steps(warm_start)} steps after the warm-up at least, not {warm_start}",
            ),
            (
                cycle <= steps - warm_start or not restarts,
                f"relora.restart_every must be at most the {steps - warm_start} steps of the low-rank phase, "
                f"not {cycle}",
            ),
            (
                rewarmup < shortest or not (rewarmup and restarts),
                f"schedule.rewarmup_steps must be less than the {shortest} steps of the shortest cycle "
                f"(relora.restart_every, restart_growth), not {rewarmup}: a cycle must outlast its ramp",
            ),
        )

    @property
    def warm_start_in_place(self) -> str | None:
        """The steps in place that train the target matrices before the switch; None where AdamW does."""
        kind = self.relora.warm_start_kind
        return kind if kind != "adamw" and self.spec.takes_variants and self.switch_step else None

    def _compile_violations(self) -> list[str]:
        """Refuse what needs to see the base's gradient together with a compiled model, which hides it."""
        if not (self.train.compile and self.spec.has_switch):
            return []
        relora = self.relora
        watching: dict[str, str] = {}
        if relora.warm_start_steps > 0:
            watching["warm_start_kind"] = relora.warm_start_kind
        if self.spec.restarts:
            watching |= {"residual": relora.residual, "init": relora.factor_init}
        return [
            f"train.compile must be false with relora.{name} {value!r}, which sees gradients in eager mode"
            for name, value in watching.items()
            if value in ("sign", "column", "muon", "gradient")
        ]

    def _variant_violations(self) -> list[str]:
        """Compare what varies the trainer's own low-rank methods with the method."""
        if self.spec.takes_variants:
            return []
        method, relora = self.run.method, self.relora
        found: dict[str, object] = {}
        # Without effect, like the rest of [relora], where there are no factors or no switch.
        if self.spec.has_switch and relora.warm_start_kind != "adamw" and relora.warm_start_steps > 0:
            found["relora.warm_start_kind"] = relora.warm_start_kind
        if self.spec.injects:
            found |= {f"relora.{name}": value for name, value in self._of_our_restarts.items()}
            if self.optim.factor_optimizer != "adamw":
                found["optim.factor_optimizer"] = self.optim.factor_optimizer
        return [
            f"{name} must not be {value!r} with run.method {method!r}: only the trainer's own methods know it"
            for name, value in found.items()
        ]

    @property
    def _of_our_restarts(self) -> dict[str, object]:
        """[relora] settings in force that need the trainer's own restarts."""
        default = ReLoRASection()
        always = ("residual", "carry_base_error", "base_weight_decay")
        found = {name: getattr(self.relora, name) for name in always}
        found = {name: value for name, value in found.items() if value != getattr(default, name)}
        names = {"init": "gradient", "reset": "transport"}
        return found | {name: value for name, value in names.items() if getattr(self.relora, name) == value}

    @property
    def idle_settings(self) -> list[str]:
        """[relora] settings that were given in vain, since run.method has factors but no restarts."""
        if not self.spec.has_switch or self.spec.restarts:
            return []
        default = ReLoRASection()
        return [name for name in _OF_RESTARTS if getattr(self.relora, name) != getattr(default, name)]

    def _tokenizer_violations(self) -> list[str]:
        origin = self.model.init_from
        own = origin is None or self.data.tokenizer != TRAIN_BPE
        return unmet((own, f"data.tokenizer must be the checkpoint's own with model.init_from: {origin!r}"))

    def _position_violations(self) -> list[str]:
        sizes = self.model.architecture
        if sizes is None or self.data.seq_len <= sizes.max_position_embeddings:
            return []
        most = f"model.max_position_embeddings {sizes.max_position_embeddings}"
        return [f"data.seq_len must be at most {most}, not {self.data.seq_len}"]

    def _rank_violations(self) -> list[str]:
        """Compare the rank with the layers known from the recipe; `inject` looks at the layers themselves."""
        sizes = self.model.architecture
        if sizes is None:
            return []
        sides = {"hidden_size": sizes.hidden_size}
        if self.relora.targets == ALL_LINEAR:
            sides["intermediate_size"] = sizes.intermediate_size
        name, side = min(sides.items(), key=lambda item: item[1])
        if side < 1 or self.relora.rank < side:
            return []
        reason = f"every target layer has a side of model.{name} {side}"
        return [f"relora.rank must be less than {side}, not {self.relora.rank}: {reason}"]


def _shortest_cycle(first: int, growth: float, steps: int) -> int:
    """Return the length of the shortest whole cycle within so many steps; the first where none is whole."""
    if not (first >= 1 and 0 < growth < 1):
        return first
    shortest, ideal = first, first * growth
    steps -= first
    while steps >= (length := max(1, round(ideal))):
        shortest, ideal, steps = length, ideal * growth, steps - length
    return shortest


_OF_RESTARTS = (
    *("restart_growth", "reset", "reset_ratio", "reset_mask", "reset_step_count"),
    *("residual", "residual_scale", "residual_every", "residual_layers", "carry_base_error"),
)

SECTIONS: dict[str, Any] = {part.name: part.type for part in fields(Recipe)}
"""The section classes of a recipe by name, in the order in which they are written."""
