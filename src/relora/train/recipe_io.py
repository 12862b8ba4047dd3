"""Recipes as files: find, read strictly, lay over one another, and write back.

Precedence is defaults < recipe file < overrides. Each of these is a layer, a mapping of sections to the
fields it sets. A field that changes takes back those which it replaces in the layers below: train.steps and
train.tokens each other, model.preset the sizes it stands for, data.source what only another source has.
All that is wrong with the layers, and with the recipe they make, is said at once.
"""

import difflib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import relora
from relora.errors import ConfigError
from relora.train.architecture import ARCHITECTURE_FIELDS
from relora.train.checks import UnfitError, field_types, fitted, section_violations
from relora.train.config import SECTIONS, DataConfig, Recipe, RunConfig
from relora.train.methods import MethodOptions, options_type

Layer = Mapping[str, Mapping[str, object]]
Typed = Mapping[str, Mapping[str, Any]]

PART_SUFFIX = ".part"
_SIZES = ARCHITECTURE_FIELDS[:4]
_TAKES_BACK = {
    ("train", "steps"): ("tokens",),
    ("train", "tokens"): ("steps",),
    ("model", "preset"): (*ARCHITECTURE_FIELDS, "init_from"),
    ("model", "init_from"): (*ARCHITECTURE_FIELDS, "preset"),
    ("data", "source"): ("path", "name", "revision"),
}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with this package by name: in the wheel, or in a source checkout."""
    package = Path(relora.__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / "quickstart.toml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: Name of a shipped recipe, a file, or a run's folder; a `Path` is never a shipped one's name.

    Raises:
        ConfigError: if there is none, naming the nearest shipped one.
    """
    shipped = shipped_recipes()
    if isinstance(recipe, str) and recipe in shipped:
        return shipped[recipe]
    path = Path(recipe)
    try:
        if path.is_dir():
            path = path / "recipe.toml"
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"recipe {str(recipe)!r} cannot be looked at: {error.strerror}") from error
    hint = nearest(str(recipe), shipped)
    raise ConfigError(
        f"recipe {str(recipe)!r} is neither a file nor one of the shipped recipes{hint}; "
        f"shipped are: {', '.join(shipped) or 'none'}"
    )


def read_recipe(path: Path) -> dict[str, dict[str, object]]:
    """Read a recipe file as a layer; keys and types are looked at when it is resolved.

    Raises:
        ConfigError: if the file cannot be read or is not TOML.
    """
    try:
        layer = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number or a nesting without end
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error
    return layer


def load_recipe(recipe: str | Path, overrides: Layer | None = None) -> Recipe:
    """Read a recipe and lay overrides over it.

    Args:
        recipe: As for `find_recipe`; of a run's folder, the run is the one there, wherever it was begun.
        overrides: Fields to set otherwise, by section.

    Raises:
        ConfigError: if there is no such recipe; or listing everything that is wrong with it, at once.
    """
    path = find_recipe(recipe)
    layer = read_recipe(path)
    run = layer.get("run", {})
    if isinstance(run, dict) and path.parent == Path(recipe):
        folder = path.parent if path.parent.name.strip(".") else path.parent.resolve()
        layer["run"] = run | {"out": str(folder.parent), "name": folder.name}
    elif isinstance(run, dict) and "name" not in run and path.name != "recipe.toml":
        layer["run"] = {"name": path.stem} | run
    return resolve(layer, overrides or {}, subject=f"recipe {path}")


def resolve(*layers: Layer, subject: str = "recipe") -> Recipe:
    """Lay layers over the defaults, the last one on top.

    Args:
        *layers: Fields to set, by section; values may have the types TOML gives them.
        subject: What the message of an error is about.

    Raises:
        ConfigError: listing every unknown key, wrong type and violation at once.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    method = RunConfig().method
    for layer in layers:
        named = _method_named(layer, method)
        if named != method:  # settings of another method say nothing of this one
            values["method"].clear()
        method = named
        typed = _typed(layer, problems, options_type(method))
        for section, field in _taken_back(typed, values):
            values[section][field] = None
        for section, given in typed.items():
            values[section].update(given)
    kinds = {**SECTIONS, "method": options_type(method)}
    sections = {name: kind(**values[name]) for name, kind in kinds.items()}
    if problems:
        raise ConfigError.from_violations(subject, [*problems, *section_violations(sections)])
    try:
        return Recipe(**sections)
    except ConfigError as error:
        raise ConfigError(f"{subject}{str(error).removeprefix('recipe')}") from None


def changed_data(base: DataConfig, changes: Mapping[str, Any]) -> DataConfig:
    """Return a [data] section with fields set otherwise, and without those that they replace."""
    taken = {field: None for _, field in _taken_back({"data": dict(changes)}, {"data": vars(base)})}
    return replace(base, **(taken | dict(changes)))


def typed_layer(layer: Layer, *, only: str) -> dict[str, Any]:
    """Return the fields a layer sets in one section, with their right types.

    Raises:
        ConfigError: listing unknown keys, wrong types, and fields of other sections.
    """
    problems: list[str] = []
    typed = _typed(layer, problems, MethodOptions)
    problems += [
        f"{name}.{key} has no effect here: only [{only}] has"
        for name in typed
        for key in typed[name]
        if name != only
    ]
    if problems:
        raise ConfigError.from_violations("settings", problems)
    return typed.get(only, {})


def recipe_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML that `resolve` reads back to an equal one; fields that are None are left out."""
    tables = []
    for name in SECTIONS:
        section = getattr(recipe, name)
        given = {field: getattr(section, field) for field in field_types(type(section))}
        if not given:  # a method without settings of its own
            continue
        lines = [f"{field} = {_toml(value)}" for field, value in given.items() if value is not None]
        tables.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(tables) + "\n"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe to a file, which appears whole or not at all."""
    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(recipe_toml(recipe))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def section_of(recipe: Recipe, name: str) -> Any:
    """Return a section of a recipe by its name, [method] as it is in force."""
    return recipe.options if name == "method" else getattr(recipe, name)


def changed_fields(before: Recipe, after: Recipe) -> dict[str, tuple[object, object]]:
    """Return the fields in which two recipes differ, as "section.field", each with both values."""
    changes = {}
    for name in SECTIONS:
        sections = [section_of(recipe, name) for recipe in (before, after)]
        kinds = set(map(type, sections))
        if len(kinds) > 1:  # [method] of another run.method, which is a change that is named
            continue
        for field in field_types(kinds.pop()):
            values = (getattr(sections[0], field), getattr(sections[1], field))
            if values[0] != values[1]:
                changes[f"{name}.{field}"] = values
    return changes


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is most like this one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _method_named(layer: Layer, below: str) -> str:
    """Return the method that a layer chooses, or the one of the layers below it."""
    run = layer.get("run")
    named = run.get("method") if isinstance(run, Mapping) else None
    return named if isinstance(named, str) else below


def _typed(layer: Layer, problems: list[str], options: type[MethodOptions]) -> dict[str, dict[str, Any]]:
    """Return the fields of a layer that exist, with their right types; append what is wrong with others."""
    typed: dict[str, dict[str, Any]] = {}
    for section, given in layer.items():
        if section not in SECTIONS:
            problems.append(_unknown_section(section, given))
        elif not isinstance(given, Mapping):
            problems.append(f"{section} must be a section [{section}], not the value {given!r}")
        else:
            types = field_types(options if section == "method" else SECTIONS[section])
            typed[section] = _typed_fields(section, types, given, problems)
    return typed


def _typed_fields(
    section: str, types: Mapping[str, Any], given: Mapping[str, object], problems: list[str]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name not in types:
            hint = nearest(name, types) if section == "method" else _nearest_key(section, name)
            problems.append(f"{section}.{name} is not a known key{hint}")
            continue
        try:
            fields[name] = fitted(types[name], value)
        except UnfitError as unfit:
            problems.append(f"{section}.{name} {unfit}")
    return fields


def _unknown_section(section: str, given: object) -> str:
    if isinstance(given, Mapping):
        return f"[{section}] is not a known section{nearest(section, SECTIONS)}"
    hint = _nearest_key("", section) or f"; the sections are {', '.join(SECTIONS)}"
    return f"{section} is not a known section, and keys belong into one{hint}"


def _nearest_key(section: str, name: str) -> str:
    """Hint at a key of the same section, or one of nearly the same name in any other; else list them."""
    if section and (hint := nearest(name, field_types(SECTIONS[section]))):
        return hint.replace("mean '", f"mean '{section}.")
    homes = {field: known for known, kind in reversed(SECTIONS.items()) for field in field_types(kind)}
    close = difflib.get_close_matches(name, list(homes), n=1, cutoff=0.8)
    if close:
        return f" (did you mean '{homes[close[0]]}.{close[0]}'?)"
    return f"; [{section}] has {', '.join(field_types(SECTIONS[section]))}" if section else ""


def _taken_back(layer: Typed, below: Typed) -> Iterable[tuple[str, str]]:
    """Yield the fields of lower layers that a layer's own fields replace."""
    for (section, field), others in _TAKES_BACK.items():
        value = layer.get(section, {}).get(field)
        if value is not None and value != below[section].get(field):
            yield from ((section, other) for other in others)
    if all(layer.get("model", {}).get(size) is not None for size in _SIZES):
        yield ("model", "preset")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        assert math.isfinite(value)
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
