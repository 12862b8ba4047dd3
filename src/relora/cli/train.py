"""`relora train [RECIPE]`: text in, a trained language model out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from relora.cli.arguments import RecipeArguments, parse_with_recipe
from relora.cli.output import is_main_process, print_json, stdout_for_result

if TYPE_CHECKING:
    from relora.train.result import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RecipeArguments):
    """Train a model by a recipe: defaults < RECIPE < --section.field value.

    The same command again resumes the run. The defaults shown are those of the recipe named before --help, or
    else those a recipe starts from.
    """

    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Delete the run of this name, if there is one, and start anew."""
    fork: str | None = None
    """Start a new run of this name from the existing run's newest checkpoint, with the changed recipe."""


def run(words: Sequence[str]) -> int:
    """Train, and return the exit code."""
    arguments, recipe = parse_with_recipe(TrainArguments, words, verb="train")
    with stdout_for_result(only_json=arguments.json):
        from relora.train.fit import fit

        result = fit(recipe, overwrite=arguments.overwrite, fork=arguments.fork)
        if result.exit_code == 0 and is_main_process():
            _conclude(result)
    code: int = result.exit_code
    if arguments.json:
        print_json({"folder": result.folder, "exit_code": code, **result.summary})
    return code


def _conclude(result: "TrainResult") -> None:
    """Write the report of a finished run, and show what came out."""
    from relora.report.page import write_report
    from relora.train.reporting import show_summary

    write_report(result.folder)
    if result.was_finished:
        print(
            f"{result.folder} is finished: --overwrite trains it anew, --fork NAME goes on", file=sys.stderr
        )
    show_summary(result.summary, result.folder)
