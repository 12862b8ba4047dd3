"""`relora doctor [RECIPE]`: find trouble before hour one."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.cli.arguments import RecipeArguments, parse_with_recipe
from relora.cli.output import print_json, stdout_for_result


@dataclass(frozen=True, kw_only=True)
class DoctorArguments(RecipeArguments):
    """Check versions, devices, precision, determinism and disk, and take one step of a recipe.

    The exit code is 0 if nothing is broken; otherwise that of the first thing that is (2 configuration, 3
    data, 4 disk, 5 not finite, 1 anything else). Warnings do not count. Only prepared data is kept.
    """


def run(words: Sequence[str]) -> int:
    """Examine, and say what was found."""
    arguments, recipe = parse_with_recipe(DoctorArguments, words, verb="doctor")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.doctor import as_result, examine

        findings = examine(recipe)
    if arguments.json:
        print_json(as_result(findings))
    else:
        print("\n".join(f"{each.verdict:<8}{each.check}: {each.said}" for each in findings))
    return next((each.exit_code for each in findings if each.verdict == "broken"), 0)
