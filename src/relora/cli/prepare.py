"""`relora prepare [RECIPE]`: do the part of a run that needs no accelerator."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import RecipeName, VerbArguments, parse, recipe_for_help, split_settings
from relora.cli.output import print_result, stdout_for_result
from relora.train.recipe_io import load_recipe


@dataclass(frozen=True, kw_only=True)
class PrepareArguments(VerbArguments):
    """Read, tokenize and cache a recipe's data, so that `relora train` with the same recipe starts at once.

    Settings of other sections are taken and change nothing here, so that a `relora train` line can be reused.
    """

    recipe: RecipeName = "quickstart"
    """Name of a shipped recipe, a TOML file, or a run's folder."""


def run(words: Sequence[str]) -> int:
    """Prepare the data, and say what there is."""
    others, overrides = split_settings(words)
    sections = {"data": recipe_for_help(others).data}
    arguments = parse(PrepareArguments, others, verb="prepare", sections=sections)
    recipe = load_recipe(arguments.recipe, overrides)
    with stdout_for_result(only_json=arguments.json):
        from relora.train.prepare import prepare_recipe

        summary = prepare_recipe(recipe)
    print_result(summary, as_json=arguments.json)
    return 0
