"""A study as a value: arms (a method with its settings), what is swept for each, seeds and lengths.

An *arm* is one line of the table. Its *grid* is tuned on the tuning split with one seed of its own; what wins
is then trained with every seed and measured on held-out text. `inherit` starts an arm from what won for
another, so that, say, all low-rank methods share the warm start at the tuned full-rank learning rate.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import relora.lab.methods  # noqa: F401 - their names are known from here on
from relora.errors import ConfigError
from relora.lab.values import flat, nested, settled
from relora.train.config import SECTIONS, DataConfig, OptimConfig, Recipe, TrainConfig
from relora.train.methods import option_fields
from relora.train.recipe_io import recipe_toml, resolve

Stage = Literal["tuning", "final"]
Search = Literal["grid", "axes"]
Flat = Mapping[str, object]

# What no longer matters before the switch: runs that agree in all else share their warm start.
_AFTER_SWITCH = {
    *("run.name", "run.out", "run.method", "optim.low_rank_lr", "optim.factor_lr"),
    *("schedule.rewarmup_steps", "checkpoint.every", "checkpoint.keep_last"),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A length of training: one of the two."""

    steps: int | None = None
    tokens: int | None = None

    @property
    def label(self) -> str:
        """How a table calls it."""
        return f"{self.steps} steps" if self.steps is not None else f"{(self.tokens or 0) / 1e6:g} M tokens"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method with its settings."""

    name: str
    method: str
    settings: Flat
    """What all its cells set otherwise than the study's recipe, as "section.field"."""
    grid: Mapping[str, tuple[object, ...]]
    """Values to tune over, by "section.field", in the order of the file; empty for none."""
    inherit: str | None = None
    """The arm whose winning settings this one begins with."""
    references: Mapping[str, str]
    """By the study's name of each reference the arm it means for this one."""

    def sweeps(self, search: Search) -> list[list[dict[str, object]]]:
        """Return the points to try, one list after the other; an axis with one value is no sweep.

        "grid" has one list, of all combinations. "axes" has one for each axis, to be tried at what won
        before it; an axis whose turn has not come is as the recipe has it.
        """
        swept = {axis: values for axis, values in self.grid.items() if len(values) > 1}
        if search == "axes":
            return [[{axis: value} for value in values] for axis, values in swept.items()]
        points = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
        return [points] if swept else []

    def own(self, swept: Flat) -> dict[str, object]:
        """Return what of a cell's swept values belongs to the axes of this arm's grid."""
        return {axis: swept[axis] for axis in self.grid if axis in swept}

    @property
    def fixed(self) -> dict[str, object]:
        """Axes of the grid with one value, which is a setting."""
        return {axis: values[0] for axis, values in self.grid.items() if len(values) == 1}

    def begins_with(self, inherited: Flat) -> dict[str, object]:
        """Return what an inherited winner contributes: all that this arm does not set itself."""
        return {key: value for key, value in inherited.items() if key not in self.settings}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study."""

    arm: str
    stage: Stage
    budget: Budget
    seed: int
    swept: Flat
    """Its values of what was tuned, for this arm or for those it inherits from."""
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return self.recipe.run.name

    @property
    def tokens(self) -> int:
        """Tokens it trains on."""
        return self.recipe.total_steps * self.recipe.tokens_per_step

    @cached_property
    def warm_start(self) -> str | None:
        """What its warm start is a function of; None where there is none to share."""
        recipe = self.recipe
        if not recipe.switch_step or recipe.relora.warm_start_until != "steps":
            return None  # where it ends, and so where its checkpoint is, is not known beforehand
        kept = {
            f"{section}.{name}": value
            for section in SECTIONS
            if section not in ("relora", "method")
            for name, value in vars(getattr(recipe, section)).items()
            if f"{section}.{name}" not in _AFTER_SWITCH
        }
        relora = recipe.relora
        kind: list[object] = [recipe.spec.warm_start]
        if recipe.warm_start_in_place is not None:
            kind += [relora.warm_start_kind, relora.warm_start_scale, relora.targets, relora.exclude]
        return _digest([*kind, recipe.switch_step, kept])


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study."""

    name: str
    question: str
    source: str
    """The text of its file."""
    base: Mapping[str, Mapping[str, object]]
    """The recipe every cell starts from."""
    settings: Flat
    """What all cells set otherwise."""
    arms: tuple[Arm, ...]
    """In an order in which every arm follows the one it inherits from."""
    seeds: tuple[int, ...]
    budgets: tuple[Budget, ...]
    references: tuple[str, ...]
    tuning_seed: int
    tuning_budget: Budget | None
    """None tunes at each budget."""
    tuning_fraction: float
    search: Search
    """Whether all combinations of a grid are tried, or one axis after the other."""
    extend: int
    """How often a grid is extended where its winner lies on an edge."""
    keep_checkpoints: bool
    """Whether the checkpoints of finished cells stay."""
    tokens_per_s: float | None
    """Of a cell, for the estimate of a dry run."""

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def cell(self, arm: Arm, stage: Stage, budget: Budget, *, seed: int, swept: Flat, out: Path) -> Cell:
        """Return a cell with its resolved recipe.

        Raises:
            ConfigError: listing what is wrong with that recipe.
        """
        settings = {**self.settings, **arm.settings, **swept, "run.method": arm.method, "run.seed": seed}
        settings |= (
            {"train.steps": budget.steps} if budget.steps is not None else {"train.tokens": budget.tokens}
        )
        settings |= {"data.tuning_fraction": self.tuning_fraction}
        settings |= {"checkpoint.keep_last": 1}
        settings |= {"eval.split": "tuning" if stage == "tuning" else "heldout"}
        recipe = self._resolved(settings, subject=f"arm {arm.name!r}")
        if recipe.train.precision == "auto":
            raise ConfigError(
                f'arm {arm.name!r}: train.precision must be "fp32" or "bf16" in a study, not "auto": cells '
                "that each measure which is faster can come to different ends. Set it in [set]"
            )
        name = f"{_slug(arm.name)}-{stage}-s{seed}-{_digest(recipe_toml(recipe))[:8]}"
        recipe = replace(recipe, run=replace(recipe.run, name=name, out=out))
        return Cell(arm=arm.name, stage=stage, budget=budget, seed=seed, swept=dict(swept), recipe=recipe)

    def _resolved(self, settings: Flat, *, subject: str) -> Recipe:
        plain = {**flat(self.base), **settings}
        length = _total_steps(plain, settings)
        rate = plain.get("optim.lr")
        lr = float(rate) if isinstance(rate, int | float) else OptimConfig().lr
        return resolve(
            self.base,
            {"run": {"name": "cell", "out": "cells"}},
            nested(settled(settings, lr=lr, steps=length)),
            subject=subject,
        )


def _total_steps(plain: Flat, settings: Flat) -> int:
    """Return the steps of a cell before its recipe is resolved; 0 where its sizes are no numbers."""
    steps, tokens = settings.get("train.steps"), settings.get("train.tokens")
    if isinstance(steps, int):
        return steps
    batch_size = plain.get("train.batch_size", TrainConfig().batch_size)
    seq_len = plain.get("data.seq_len", DataConfig().seq_len)
    if isinstance(tokens, int) and isinstance(batch_size, int) and isinstance(seq_len, int):
        return tokens // max(1, batch_size * seq_len)
    return 0


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Return every field of a recipe as "section.field", as JSON values."""
    fields: dict[str, Any] = {}
    for section in SECTIONS:
        value = getattr(recipe, section)
        for name, field in (option_fields(value) if section == "method" else vars(value)).items():
            fields[f"{section}.{name}"] = str(field) if isinstance(field, Path) else field
    return fields


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _slug(name: str) -> str:
    kept = "".join(char if char.isalnum() or char in "._=+" else "-" for char in name)
    return "-".join(filter(None, kept.split("-")))[:80] or "arm"


def arm_named(arms: Mapping[str, Mapping[str, object]], wanted: str, mine: Flat) -> list[str]:
    """Return the arms that a name can mean: the arm itself, or those of a method whose varied values agree.

    Args:
        arms: The varied values of each arm, by its name.
        wanted: An arm or a method of the study.
        mine: The varied values of the arm that refers to it.
    """
    if wanted in arms:
        return [wanted]
    return [
        name
        for name, varied in arms.items()
        if name.partition(" ")[0] == wanted
        and all(mine[axis] == value for axis, value in varied.items() if axis in mine)
    ]
