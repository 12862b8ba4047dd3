"""Checks of settings: what a field's annotation admits, said in words a user can act on.

One reading of an annotation serves recipes (TOML values), the command line (words) and dataclasses built by
hand, so that the same mistake gets the same message wherever it is made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

TRUTHS = {"true": True, "false": False}


class UnfitError(ValueError):
    """A value that an annotation does not admit; the message says what would fit."""


def unmet(*rules: tuple[bool, str]) -> list[str]:
    """Return the messages of the rules that do not hold."""
    return [message for holds, message in rules if not holds]


def field_types(section: type[Any]) -> dict[str, Any]:
    """Return the annotations of a config dataclass by field name, in the order of their definition."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section)}


def section_violations(sections: Mapping[str, Any]) -> list[str]:
    """Return what is wrong in any section by itself, each as "section.field must ..."."""
    found = []
    for name, section in sections.items():
        problems = type_problems(section) or section.violations()
        found += [f"{name}.{problem}" for problem in problems]
    return found


def type_problems(section: object) -> list[str]:
    """Return what is wrong with the types of a config dataclass, which may have been built by hand."""
    problems = []
    for name, annotation in field_types(type(section)).items():
        value = getattr(section, name)
        try:
            if fitted(annotation, value) != value:
                problems.append(f"{name} must be {described(annotation)}, not {_shown(value)}")
        except UnfitError as unfit:
            problems.append(f"{name} {unfit}")
    return problems


def fitted(annotation: Any, value: object) -> Any:
    """Return `value` as the annotation wants it: lists become tuples, whole numbers floats, texts paths.

    Raises:
        UnfitError: with "must be ..., not ..." if the annotation does not admit the value.
    """
    for option in options(annotation):
        try:
            return _fitted_option(option, value)
        except UnfitError:
            continue
    raise UnfitError(f"must be {described(annotation)}, not {_shown(value)}")


def from_words(annotation: Any, words: Sequence[str]) -> Any:
    """Read the words that followed an option on the command line.

    Raises:
        UnfitError: as `fitted`.
    """
    kinds = options(annotation)
    if NoneType in kinds and [word.lower() for word in words] == ["none"]:  # else it would be a text's "none"
        return None
    for option in kinds:
        try:
            return fitted(option, _literal(option, words))
        except UnfitError:
            continue
    shown = " ".join(words) if words else "nothing"
    raise UnfitError(f"must be {described(annotation)}, not {shown}")


def takes(annotation: Any) -> int | None:
    """Return how many words a field takes on the command line; None means as many as come."""
    counts = [_takes_option(option) for option in options(annotation)]
    return None if None in counts else max(count for count in counts if count is not None)


def described(annotation: Any) -> str:
    """Say in words what an annotation admits."""
    return " or ".join(_described_option(option) for option in options(annotation))


def options(annotation: Any) -> list[Any]:
    """Return the members of a union, None last; any other annotation alone."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return sorted(get_args(annotation), key=lambda option: option is NoneType)


def _fitted_option(option: Any, value: object) -> Any:
    if get_origin(option) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(option)):
            return value
    elif get_origin(option) is tuple:
        return _fitted_tuple(get_args(option), value)
    elif option is float:
        return _fitted_float(value)
    elif option is Path:
        return Path(_fitted_text(str(value) if isinstance(value, Path) else value))
    elif option is str:
        return _fitted_text(value)
    elif option in (bool, int, NoneType):
        if type(value) is option:
            return value
    else:
        raise TypeError(f"config fields of type {option!r} are not supported")
    raise UnfitError


def _fitted_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnfitError
    try:
        number = float(value)
    except OverflowError:
        raise UnfitError from None
    if not math.isfinite(number):
        raise UnfitError
    return number


def _fitted_text(value: object) -> str:
    if not isinstance(value, str) or not _encodable(value):
        raise UnfitError
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _fitted_tuple(members: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UnfitError
    if members[-1] is Ellipsis:
        return tuple(fitted(members[0], item) for item in value)
    if len(members) != len(value):
        raise UnfitError
    return tuple(fitted(member, item) for member, item in zip(members, value, strict=True))


def _takes_option(option: Any) -> int | None:
    if get_origin(option) is not tuple:
        return 1
    members = get_args(option)
    return None if members[-1] is Ellipsis else len(members)


def _literal(option: Any, words: Sequence[str]) -> object:
    """Turn words into the value they spell for one member of an annotation, or leave them for the error."""
    if get_origin(option) is tuple:
        members = get_args(option)
        if members[-1] is Ellipsis:
            members = (members[0],) * len(words)
        if len(members) != len(words):
            raise UnfitError
        return [from_words(member, [word]) for member, word in zip(members, words, strict=True)]
    if len(words) != 1:
        raise UnfitError
    word = words[0]
    if option is bool:
        return TRUTHS.get(word.lower(), word)
    if option in (int, float):
        return _number(option, word)
    if get_origin(option) is Literal:
        return next((choice for choice in get_args(option) if str(choice) == word), word)
    return word


def _number(kind: type[int] | type[float], word: str) -> object:
    try:
        return kind(word)
    except ValueError:
        raise UnfitError from None


def _described_option(option: Any) -> str:
    if get_origin(option) is Literal:
        choices = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in get_args(option)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(option) is tuple:
        members = get_args(option)
        if members[-1] is Ellipsis:
            return f"a list, each {described(members[0])}"
        return f"a list of {len(members)}, each {' / '.join(dict.fromkeys(map(described, members)))}"
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        Path: "a path",
        NoneType: "none",
    }
    return names[option]


def _shown(value: object) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
