"""A recipe's methods side by side before any of them runs, and what would make each fit into a memory.

A run that warms up needs the memory of full rank until the switch, so a method's peak is the larger of its
phases'. Speed is compared by counted FLOPs: what is expected where matrix products take all the time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from relora.errors import ConfigError
from relora.lab.planner.footprint import Footprint, footprint
from relora.train.config import Recipe
from relora.train.phase import Plan
from relora.train.precision import Resolved
from relora.train.sections import ReLoRASection

Settings = Mapping[str, Any]

# name -> the settings that make the recipe train that way.
METHODS: dict[str, dict[str, Any]] = {
    "full": {"run.method": "full"},
    "lora": {"run.method": "lora", "relora.factors": "both"},
    "relora": {"run.method": "relora", "relora.factors": "both"},
    "relora, one-sided": {"run.method": "relora", "relora.factors": "B"},
}


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """What one method needs for a recipe."""

    footprint: Footprint
    """Of the phase the method is named for: the low-rank one, or full rank."""
    run_peak_bytes: int
    """The most of the whole run, its warm start included."""
    warm_start_peak_bytes: int
    """What the run's peak is with a warm start of any length."""
    speedup: float
    """FLOPs of full rank over this method's, a token of this phase."""
    run_speedup: float
    """The same over the whole run, its warm start included."""
    fits: bool | None
    """Whether the run fits; None where no memory was given."""
    settings: Settings | None
    """Changes to the recipe with which it would fit; empty if it does as it is, None if none were found."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Every method of a recipe, and the run's length."""

    recipe: Recipe
    precision: Resolved
    devices: int
    memory_bytes: int | None
    methods: dict[str, MethodPlan]
    unavailable: dict[str, str]
    """Methods that this recipe cannot train with, and why."""
    restarts: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        recipe = self.recipe
        return {
            "recipe": recipe.run.name,
            "method": recipe.run.method,
            "precision": self.precision,
            "seq_len": recipe.data.seq_len,
            "batch_size": recipe.train.batch_size,
            "micro_batch_size": recipe.train.micro_batch_size,
            "gradient_checkpointing": recipe.train.gradient_checkpointing,
            "rank": recipe.relora.rank,
            "devices": self.devices,
            "steps": recipe.total_steps,
            "tokens": recipe.total_steps * recipe.tokens_per_step,
            "warm_start_steps": recipe.relora.warm_start_steps,
            "restarts": self.restarts,
            "memory_bytes": self.memory_bytes,
            "methods": {name: asdict(method) for name, method in self.methods.items()},
            "unavailable": self.unavailable,
        }


def plan_run(
    recipe: Recipe, *, memory_bytes: int | None = None, vocab_size: int | None = None, devices: int = 1
) -> RunPlan:
    """Foretell what each method needs for a recipe; nothing is allocated and nothing trained.

    Args:
        recipe: The run; train.precision "auto" is planned as bf16, which every current GPU has.
        memory_bytes: Memory of one device; settings that fit are looked for where a method does not.
        vocab_size: Entries of the tokenizer, where the recipe's is not at hand.
        devices: Processes that share a batch under DDP.

    Raises:
        ConfigError: if the batch cannot be shared so, or the model cannot be built.
    """
    share = recipe.train.micro_batch_size * devices
    if recipe.train.batch_size % share:
        raise ConfigError(
            f"train.batch_size {recipe.train.batch_size} must be a multiple of train.micro_batch_size times "
            f"the {devices} devices, {share}"
        )
    precision: Resolved = "bf16" if recipe.train.precision == "auto" else recipe.train.precision
    planner = Planner(precision=precision, vocab_size=vocab_size, devices=devices)
    full = planner.phase(recipe, low_rank=False)
    methods, unavailable = {}, {}
    for name, settings in METHODS.items():
        try:
            variant = with_settings(recipe, settings)
            phase = planner.phase(variant, low_rank=name != "full")
        except ConfigError as error:
            unavailable[name] = str(error)
            continue
        peak = planner.peak(variant)
        is_fit = None if memory_bytes is None else peak <= memory_bytes
        found = {} if is_fit else None if memory_bytes is None else planner.fitting(variant, memory_bytes)
        methods[name] = MethodPlan(
            footprint=phase,
            run_peak_bytes=peak,
            warm_start_peak_bytes=max(full.peak_bytes, phase.peak_bytes),
            speedup=full.flops_per_token / phase.flops_per_token,
            run_speedup=_over_run(variant, full.flops_per_token, phase.flops_per_token),
            fits=is_fit,
            settings=found,
        )
    return RunPlan(
        recipe=recipe,
        precision=precision,
        devices=devices,
        memory_bytes=memory_bytes,
        methods=methods,
        unavailable=unavailable,
        restarts=len(Plan(recipe=recipe).restart_steps),
    )


class Planner:
    """Footprints of variants of a recipe, each measured once."""

    def __init__(self, *, precision: Resolved, vocab_size: int | None, devices: int) -> None:
        self._options: dict[str, Any] = {
            "precision": precision,
            "vocab_size": vocab_size,
            "devices": devices,
        }
        self._devices = devices
        self._known: dict[tuple[Recipe, bool], Footprint] = {}

    def phase(self, recipe: Recipe, *, low_rank: bool) -> Footprint:
        """Return the footprint of a phase; what makes no difference to it is not told apart."""
        method: Literal["full", "relora"] = "relora" if low_rank else "full"
        section = replace(recipe.relora, warm_start_steps=0) if low_rank else ReLoRASection()
        same = replace(recipe, run=replace(recipe.run, method=method), relora=section)
        if (same, low_rank) not in self._known:
            self._known[same, low_rank] = footprint(same, low_rank=low_rank, **self._options)
        return self._known[same, low_rank]

    def peak(self, recipe: Recipe) -> int:
        """Return the peak of a whole run: the larger of its phases'."""
        return max(self._peaks(recipe))

    def _peaks(self, recipe: Recipe) -> Iterator[int]:
        if recipe.switch_step != 0:
            yield self.phase(recipe, low_rank=False).peak_bytes
        if recipe.switch_step is not None:
            yield self.phase(recipe, low_rank=True).peak_bytes

    def fitting(self, recipe: Recipe, memory_bytes: int) -> Settings | None:
        """Return the changes that make a run fit and cost least: first time, then quality.

        The micro batch is kept as large as it can be under each of them. None if nothing here helps.
        """
        for settings in _remedies(recipe):
            variant = with_settings(recipe, settings)
            rows = self._most_rows(variant, memory_bytes)
            if rows is not None:
                is_kept = rows == recipe.train.micro_batch_size
                return {**settings, **({} if is_kept else {"train.micro_batch_size": rows})}
        return None

    def _most_rows(self, recipe: Recipe, memory_bytes: int) -> int | None:
        """Return the largest micro batch that fits, at most the recipe's; None if not even one row does."""
        given = recipe.train.micro_batch_size
        share = recipe.train.batch_size // self._devices
        choices = [rows for rows in range(given, 0, -1) if share % rows == 0]

        def with_rows(rows: int) -> Recipe:
            return with_settings(recipe, {"train.micro_batch_size": rows})

        if any(peak > memory_bytes for peak in self._peaks(with_rows(1))):  # the first that does decides
            return None
        least, most = self.peak(with_rows(1)), self.peak(recipe)
        # The peak is the largest of several straight lines in the rows, so it lies below this one.
        for rows in choices:
            estimate = least if given == 1 else least + (most - least) * (rows - 1) / (given - 1)
            if estimate <= memory_bytes and self.peak(with_rows(rows)) <= memory_bytes:
                return rows
        return 1


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return a recipe with fields set as "section.field".

    Raises:
        ConfigError: if they do not fit it.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    changed: dict[str, Any] = {
        section: replace(getattr(recipe, section), **fields) for section, fields in sections.items()
    }
    return replace(recipe, **changed)


def _remedies(recipe: Recipe) -> Iterator[Settings]:
    """Yield changes from the cheapest on: recomputation costs time, what follows costs quality as well."""
    yield {}
    checkpointing = {"train.gradient_checkpointing": True}
    yield checkpointing
    if recipe.run.method == "full":
        return
    one_sided = checkpointing | {"relora.factors": "B"}
    cold = {"relora.warm_start_steps": 0}
    has_warm_start = recipe.relora.warm_start_steps > 0
    for settings in ({}, checkpointing, one_sided) if has_warm_start else (one_sided,):
        yield settings | (cold if has_warm_start else {})
    rank = recipe.relora.rank // 2
    while rank >= 8:
        yield one_sided | {"relora.rank": rank} | (cold if has_warm_start else {})
        rank //= 2


def _over_run(recipe: Recipe, full: float, low_rank: float) -> float:
    steps, switch = recipe.total_steps, recipe.switch_step
    if switch is None:
        return 1.0
    return steps * full / (switch * full + (steps - switch) * low_rank)
