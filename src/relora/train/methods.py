"""The methods a run can train by, as far as a recipe must know them: without torch.

A method is a `MethodSpec` under a name, and a `TrainingMethod` that is imported when a run is built. The
trainer knows three; others (the laboratory's) register themselves, and whoever reads recipes that name them
imports their package first. Arrows stay as they are: nothing here knows who registers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relora.errors import ConfigError
from relora.train.checks import field_types, unmet

if TYPE_CHECKING:
    from relora.train.config import Recipe
    from relora.train.training_method import TrainingMethod


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The [method] section: settings of the method that run.method names. Those of the trainer have none."""

    def violations(self) -> list[str]:
        """Return what is wrong with these fields, in words."""
        return []

    def cross_violations(self, recipe: "Recipe") -> list[str]:
        """Return what does not go together with the rest of a recipe, in words."""
        del recipe
        return []


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What a recipe must know of a method."""

    name: str
    """As in run.method."""
    implementation: str
    """Module and class of its TrainingMethod, "package.module:Class"; imported when a run is built."""
    options: type[MethodOptions] = MethodOptions
    """Class of its [method] section."""
    has_switch: bool = True
    """Whether it begins after a warm start of relora.warm_start_steps, which may be 0."""
    injects: bool = True
    """Whether its checkpoints after the switch hold LoRALinear factors."""
    restarts: bool = False
    """Whether relora.restart_every divides its second phase, and the learning rate with it."""
    takes_variants: bool = False
    """Whether its factors and restarts are the trainer's own, which know Muon, a warm start by steps in
    place, and what needs the base's gradient."""
    warm_start: str = "adamw"
    """What the full-rank phase trains by, whose states these are: runs that differ only after the switch may
    share theirs, and a fork goes on with them."""


STEPPED_BY = {"sign": "steps without state", "column": "steps without state", "muon": "Muon in place"}
"""What trains the target matrices where they step in place, by relora.warm_start_kind, as `warm_start`."""

_METHODS: dict[str, MethodSpec] = {}


def register_method(spec: MethodSpec) -> None:
    """Make a method known by its name; a field its options share with another method has the same type."""
    mine = field_types(spec.options)
    for name, annotation in mine.items():
        known = option_annotation(name)
        assert known in (None, annotation), f"[method] {name} is {known} elsewhere, {annotation} here"
    _METHODS[spec.name] = spec


def method_names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(_METHODS)


def method_spec(name: str) -> MethodSpec | None:
    """Return the method of a name, or None."""
    return _METHODS.get(name)


def options_type(name: object) -> type[MethodOptions]:
    """Return the class of the [method] section of a method; the empty one for an unknown name."""
    spec = _METHODS.get(name) if isinstance(name, str) else None
    return MethodOptions if spec is None else spec.options


def option_annotation(field: str) -> Any:
    """Return the type of a field of the [method] section, whichever method it belongs to; None if unknown."""
    for spec in _METHODS.values():
        if field in (types := field_types(spec.options)):
            return types[field]
    return None


def load_method(name: str) -> type["TrainingMethod"]:
    """Import the implementation of a method that a valid recipe names."""
    from importlib import import_module

    module, _, kind = _METHODS[name].implementation.partition(":")
    found: type[TrainingMethod] = getattr(import_module(module), kind)
    return found


def options_violations(recipe: "Recipe") -> list[str]:
    """Return what is wrong between a recipe and its [method] section."""
    spec = method_spec(recipe.run.method)
    if spec is None:
        return []
    given = type(recipe.method)
    if given is not MethodOptions and given is not spec.options:
        return [f"[method] holds settings of another method ({given.__name__}) than run.method {spec.name!r}"]
    return recipe.options.cross_violations(recipe)


def unknown_method(name: str) -> list[str]:
    """Return the complaint about a method that is not registered, or nothing."""
    listed = ", ".join(f'"{known}"' for known in _METHODS)
    return unmet((name in _METHODS, f"method must be one of {listed}, not {name!r}"))


def require_method(name: str) -> MethodSpec:
    """Return the method of a name.

    Raises:
        ConfigError: if there is none.
    """
    if complaints := unknown_method(name):
        raise ConfigError(f"run.{complaints[0]}")
    return _METHODS[name]


def option_fields(options: MethodOptions) -> Mapping[str, object]:
    """Return the settings of a [method] section by name."""
    return {name: getattr(options, name) for name in field_types(type(options))}


_HERE = "relora.train.training_method"
for _spec in (
    MethodSpec(name="full", implementation=f"{_HERE}:TrainingMethod", has_switch=False, injects=False),
    MethodSpec(name="lora", implementation=f"{_HERE}:LowRank", takes_variants=True),
    MethodSpec(name="relora", implementation=f"{_HERE}:Restarting", restarts=True, takes_variants=True),
):
    register_method(_spec)
