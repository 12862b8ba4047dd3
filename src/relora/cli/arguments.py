"""Words of the command line -> a verb's typed arguments and the settings that override a recipe.

`--section.field value` is read here, by the same rules and with the same messages as a recipe file; a verb's
own options, and the help of everything, are tyro's.
"""

import io
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from relora.cli.output import HelpShown
from relora.cli.section_help import with_sections
from relora.errors import ConfigError
from relora.train.checks import UnfitError, field_types, from_words, takes
from relora.train.config import SECTIONS, Recipe
from relora.train.methods import option_annotation
from relora.train.recipe_io import load_recipe

Overrides = dict[str, dict[str, object]]
Kind = TypeVar("Kind", bound="VerbArguments")
RecipeKind = TypeVar("RecipeKind", bound="RecipeArguments")

RecipeName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
"""A positional argument: the name of a shipped recipe, a file, or a run's folder."""

FolderPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
"""A positional argument: the folder of a run or a model."""

_HELP = {"-h", "--help"}
_SETTING = re.compile(r"--([A-Za-z][\w-]*)\.([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_FRAME = re.compile("\x1b\\[[0-9;]*m|[\u2500-\u257f]")


@dataclass(frozen=True, kw_only=True)
class VerbArguments:
    """What every verb takes."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result, or the error, as one JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class RecipeArguments(VerbArguments):
    """What every verb takes that is given a recipe."""

    recipe: RecipeName = "quickstart"
    """Name of a shipped recipe, a TOML file, or a run's folder."""


def parse(
    kind: type[Kind], words: Sequence[str], *, verb: str, sections: Mapping[str, object] | None = None
) -> Kind:
    """Read a verb's own arguments.

    Args:
        kind: Their dataclass.
        words: What followed the verb, without settings of recipe sections.
        verb: For messages.
        sections: Sections of a recipe that the verb takes settings of, by name: for its help.

    Raises:
        ConfigError: if the words do not fit; the message is tyro's.
        HelpShown: if they asked for help.
    """
    if sections and _HELP & set(words):
        return parse(with_sections(kind, sections), words, verb=verb)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            arguments: Kind = tyro.cli(
                kind,
                args=list(words),
                prog=f"relora {verb}",
                use_underscores=True,
                config=(tyro.conf.HelptextFromCommentsOff,),
            )
    except SystemExit as stop:
        if stop.code and sections:  # so that the message can name a setting that is alike
            return parse(with_sections(kind, sections), words, verb=verb)
        if stop.code:
            raise ConfigError(f"{verb}: {_unframed(complaint.getvalue())}") from None
        raise HelpShown from None
    sys.stderr.write(complaint.getvalue())
    return arguments


def split_settings(words: Sequence[str]) -> tuple[list[str], Overrides]:
    """Take `--section.field value` out of the words.

    Returns:
        The other words, and the settings by section. Settings that are unknown or do not fit are handed on as
        they are, for the recipe to complain about together with its own problems.

    Raises:
        ConfigError: if a setting lacks its value.
    """
    others: list[str] = []
    overrides: Overrides = {}
    position = 0
    while position < len(words):
        setting = _SETTING.fullmatch(words[position])
        position += 1
        if setting is None:
            others.append(words[position - 1])
            continue
        section, field = (part.replace("-", "_") for part in setting.group(1, 2))
        annotation = field_types(SECTIONS[section]).get(field) if section in SECTIONS else None
        if section == "method":  # which method has the setting, only the recipe knows
            annotation = option_annotation(field)
        inline = setting.group(3)
        values = [inline] if inline is not None else _values(words[position:], annotation)
        position += 0 if inline is not None else len(values)
        overrides.setdefault(section, {})[field] = _value(f"{section}.{field}", annotation, values)
    return others, overrides


def parse_with_recipe(
    kind: type[RecipeKind], words: Sequence[str], *, verb: str, only: Sequence[str] = tuple(SECTIONS)
) -> tuple[RecipeKind, Recipe]:
    """Read a verb's own arguments, and the recipe they name with the settings among the words laid over it.

    Args:
        kind: Dataclass of the arguments.
        words: What followed the verb.
        verb: For messages.
        only: Sections that the help shows.

    Raises:
        ConfigError: as `parse`, `split_settings` and `load_recipe`.
        HelpShown: if they asked for help.
    """
    others, overrides = split_settings(words)
    shown = vars(_recipe_for_help(kind, others, verb=verb))
    arguments = parse(kind, others, verb=verb, sections={name: shown[name] for name in only})
    return arguments, load_recipe(arguments.recipe, overrides)


def _recipe_for_help(kind: type[RecipeKind], words: Sequence[str], *, verb: str) -> Recipe:
    """Return the recipe whose values the help shows as defaults: the one named before --help, if any."""
    others = [word for word in words if word not in _HELP]
    if not _HELP & set(words) or not others:
        return Recipe()
    named = parse(kind, others, verb=verb).recipe
    return load_recipe(named) if named in others else Recipe()


def _values(words: Sequence[str], annotation: object) -> list[str]:
    """Return the words that belong to the setting before them."""
    end = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    count = 1 if annotation is None else takes(annotation)
    return list(words[: end if count is None else min(count, end)])


def _value(name: str, annotation: object, words: list[str]) -> object:
    if annotation is None:
        return " ".join(words)
    if annotation is bool and not words:
        return True
    count = takes(annotation)
    if count is not None and len(words) < count:
        raise ConfigError(f"--{name} must be followed by {'a value' if count == 1 else f'{count} values'}")
    try:
        return from_words(annotation, words)
    except UnfitError:
        return " ".join(words)


def _unframed(text: str) -> str:
    """Return tyro's message without colours, the box around it, and the box's title."""
    lines = [_FRAME.sub("", line).strip() for line in text.splitlines()[1:]]
    return "\n  ".join(line for line in lines if line.strip("-"))
