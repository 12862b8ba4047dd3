"""`relora prepare [RECIPE]`: do the part of a run that needs no accelerator."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import RecipeArguments, parse_with_recipe
from relora.cli.output import print_result, stdout_for_result


@dataclass(frozen=True, kw_only=True)
class PrepareArguments(RecipeArguments):
    """Read, tokenize and cache a recipe's data, so that `relora train` with the same recipe starts at once.

    Settings of other sections are taken and change nothing here, so that a `relora train` line can be reused.
    """


def run(words: Sequence[str]) -> int:
    """Prepare the data, and say what there is."""
    arguments, recipe = parse_with_recipe(PrepareArguments, words, verb="prepare", only=("data",))
    with stdout_for_result(only_json=arguments.json):
        from relora.train.prepare import prepare_recipe

        summary = prepare_recipe(recipe)
    print_result(summary, as_json=arguments.json)
    return 0
