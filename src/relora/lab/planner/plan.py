"""A recipe's methods side by side before any of them runs, and what would make each fit into a memory.

A run that warms up needs the memory of full rank until the switch (or that of steps in place), so a method's
peak is the larger of its phases'. Speed is compared by counted FLOPs: what is expected where matrix products
take all the time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from relora.errors import ConfigError
from relora.lab.planner.footprint import DeviceType, Footprint, footprint
from relora.train.blueprint import blueprint
from relora.train.config import Recipe
from relora.train.methods import options_type
from relora.train.phase import Plan
from relora.train.precision import Resolved, resolve_precision
from relora.train.sections import ReLoRASection

Settings = Mapping[str, Any]
# Architectures that benchmarks/plan_accuracy.py compares with measurements.
MEASURED = ("llama", "gpt2", "gemma2", "mistral", "opt", "qwen2")
_OF_STEPS_IN_PLACE = ("rank", "targets", "exclude", "warm_start_kind", "warm_start_steps", "warm_start_scale")
_LEAST_RANK = 32  # a base in 8 bits leaves little to win below it

# name -> the settings that make the recipe train that way. With both factors there is no complement.
_BOTH = {"relora.factors": "both", "relora.residual": "none", "relora.residual_scale": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"run.method": "full"},
    "lora": {"run.method": "lora", **_BOTH},
    "relora": {"run.method": "relora", **_BOTH},
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
    """What the run's peak is with a warm start of any length, by AdamW where the recipe has none."""
    speedup: float
    """FLOPs of full rank over this method's, a token of this phase."""
    run_speedup: float
    """The same over the whole run, its warm start included."""
    fits: bool | None
    """Whether the run fits; None where no memory was given."""
    settings: Settings | None
    """Changes to the recipe with which it would fit; empty if it does as it is, None if none were found."""
    least_peak_bytes: int | None
    """Where none were found, the peak with the settings that need least; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Every method of a recipe, and the run's length."""

    recipe: Recipe
    precision: Resolved
    device: DeviceType
    devices: int
    memory_bytes: int | None
    methods: dict[str, MethodPlan]
    unavailable: dict[str, str]
    """Methods that this recipe cannot train with, and why."""
    restarts: int
    notes: tuple[str, ...]
    """What is not planned, and how far the figures can be trusted where it is less than usual."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        recipe = self.recipe
        return {
            "recipe": recipe.run.name,
            "method": recipe.run.method,
            "precision": self.precision,
            "device": self.device,
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
            "notes": list(self.notes),
        }


def plan_run(
    recipe: Recipe,
    *,
    memory_bytes: int | None = None,
    vocab_size: int | None = None,
    devices: int = 1,
    device: DeviceType = "cpu",
) -> RunPlan:
    """Foretell what each method needs for a recipe; nothing is allocated and nothing trained.

    Args:
        recipe: The run; train.precision "auto" is bf16 on a GPU, and on a CPU what it would be here.
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
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else resolve_precision("auto", torch.device("cpu"))[0]
    planner = Planner(precision=precision, vocab_size=vocab_size, devices=devices, device=device)
    full = planner.phase(with_settings(recipe, METHODS["full"]), low_rank=False)
    methods, unavailable = {}, {}
    for name, settings in METHODS.items():
        try:
            variant = with_settings(recipe, settings)
            phase = planner.phase(variant, low_rank=name != "full")
        except ConfigError as error:
            unavailable[name] = str(error)
            continue
        peak, start = planner.peak(variant), planner.phase(variant, low_rank=False)
        is_fit = None if memory_bytes is None else peak <= memory_bytes
        found: Settings | None = {}
        least = None
        if memory_bytes is not None and not is_fit:
            found, least = planner.fitting(variant, memory_bytes)
        methods[name] = MethodPlan(
            footprint=phase,
            run_peak_bytes=peak,
            warm_start_peak_bytes=max(start.peak_bytes, phase.peak_bytes),
            speedup=full.flops_per_token / phase.flops_per_token,
            run_speedup=_over_run(variant, full, start, phase),
            fits=is_fit,
            settings=None if memory_bytes is None else found,
            least_peak_bytes=least if found is None else None,
        )
    return RunPlan(
        recipe=recipe,
        precision=precision,
        device=device,
        devices=devices,
        memory_bytes=memory_bytes,
        methods=methods,
        unavailable=unavailable,
        restarts=len(Plan(recipe=recipe).restart_steps),
        notes=(*_left_out(recipe), *_doubts(blueprint(recipe, vocab_size=vocab_size).config)),
    )


class Planner:
    """Footprints of variants of a recipe, each measured once."""

    def __init__(
        self, *, precision: Resolved, vocab_size: int | None, devices: int, device: DeviceType
    ) -> None:
        self._options: dict[str, Any] = {
            "precision": precision,
            "vocab_size": vocab_size,
            "devices": devices,
            "device": device,
        }
        self._devices = devices
        self._known: dict[tuple[Recipe, bool], Footprint] = {}

    def phase(self, recipe: Recipe, *, low_rank: bool) -> Footprint:
        """Return the footprint of a phase; what makes no difference to it is not told apart."""
        method, section = "full", ReLoRASection()
        if low_rank:
            method, section = "relora", replace(recipe.relora, warm_start_steps=0)
        elif recipe.warm_start_in_place is not None:
            method = "lora"
            section = ReLoRASection(**{name: getattr(recipe.relora, name) for name in _OF_STEPS_IN_PLACE})
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

    def fitting(self, recipe: Recipe, memory_bytes: int) -> tuple[Settings | None, int]:
        """Return the changes that make a run fit and cost least: first time, then quality.

        The micro batch is kept as large as it can be under each of them.

        Returns:
            The changes, None if nothing here helps; and the least peak that was met on the way.
        """
        least = self.peak(recipe)
        for settings in _remedies(recipe):
            variant = with_settings(recipe, settings)
            rows = self._most_rows(variant, memory_bytes)
            if rows is not None:
                is_kept = rows == recipe.train.micro_batch_size
                changes = {**settings, **({} if is_kept else {"train.micro_batch_size": rows})}
                return changes, least
            # With a warm start by AdamW full rank decides, whatever else changes.
            if variant.switch_step == 0 or variant.warm_start_in_place is not None:
                least = min(least, self.peak(with_settings(variant, {"train.micro_batch_size": 1})))
        return None, least

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


def device_here() -> DeviceType:
    """Return what this machine would train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    if "run" in changed and changed["run"].method != recipe.run.method:
        changed["method"] = options_type(changed["run"].method)()
    return replace(recipe, **changed)


def _remedies(recipe: Recipe) -> Iterator[Settings]:
    """Yield changes from the cheapest on: recomputation costs time, what follows costs quality as well."""
    yield {}
    checkpointing = {"train.gradient_checkpointing": True}
    yield checkpointing
    if recipe.run.method == "full":
        return
    starts: list[Settings] = [{}]
    if recipe.switch_step:
        starts = [{"relora.warm_start_steps": 0}]
        if recipe.warm_start_in_place is not None:
            starts.insert(0, {})
        elif recipe.spec.takes_variants and not recipe.train.compile:
            starts.insert(0, {"relora.warm_start_kind": "muon", "relora.warm_start_scale": 2.5})
    for start in starts:
        if start:
            yield start
            yield {**checkpointing, **start}
        yield from _smaller(recipe, {**checkpointing, **start})


def _smaller(recipe: Recipe, settings: Settings) -> Iterator[Settings]:
    """Yield settings with what makes the low-rank phase smaller and smaller."""
    if recipe.relora.factors != "B":
        settings = {**settings, "relora.factors": "B"}
        yield settings
    if recipe.relora.base_dtype == "keep":
        for dtype in ("bf16", "int8"):
            settings = {**settings, "relora.base_dtype": dtype, "relora.master": "host"}
            yield settings
    rank = recipe.relora.rank // 2
    while rank >= _LEAST_RANK:
        yield {**settings, "relora.rank": rank}
        rank //= 2


def _left_out(recipe: Recipe) -> Iterator[str]:
    """Say that a method of the laboratory's is not among those planned."""
    method = recipe.run.method
    if all(settings["run.method"] != method for settings in METHODS.values()):
        yield f"{method}, which this recipe trains by, is not planned: these are the trainer's own methods"


def _doubts(config: PretrainedConfig) -> Iterator[str]:
    """Say what makes an architecture's figures less certain than a LLaMA's."""
    kind, experts = config.model_type, ("num_local_experts", "num_experts", "n_routed_experts")
    if any(getattr(config, name, None) for name in experts):
        yield (
            f"{kind} has experts: how many tokens each gets is known in a run only, and is planned as if "
            "each got all. Weights and states are exact; activations and peaks are bounds from above"
        )
    elif kind not in MEASURED:
        yield (
            f"{kind} is an architecture that no benchmark here has measured ({', '.join(MEASURED)} are): "
            "weights and states are exact; take peaks for estimates, and let `relora doctor` take a real step"
        )


def _over_run(recipe: Recipe, full: Footprint, start: Footprint, low_rank: Footprint) -> float:
    """Return FLOPs of full rank over those of a run with a warm start."""
    steps, switch = recipe.total_steps, recipe.switch_step
    if switch is None:
        return 1.0
    run = switch * start.flops_per_token + (steps - switch) * low_rank.flops_per_token
    return steps * full.flops_per_token / run
